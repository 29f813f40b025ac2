"""TaiChi: one model on several vLLM instances, between prefill-decode aggregation and disaggregation."""

__version__ = "0.1.0"
