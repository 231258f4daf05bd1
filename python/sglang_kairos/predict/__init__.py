"""Pure numerics: how long a prefill or a decode step will take, corrected by what steps took."""
