"""Stock and Kairos in turn on one GPU: `run`.

`pack` and `install` are in `contrib/air_gapped`; their old names here work for one release.
"""

from pathlib import Path

__path__ += [str(Path(__file__).resolve().parents[2] / "contrib" / "air_gapped")]
