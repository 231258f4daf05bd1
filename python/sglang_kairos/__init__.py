"""Kairos: SLO-aware scheduling for prefill/decode disaggregated LLM serving on SGLang."""

__version__ = "0.1.0"
