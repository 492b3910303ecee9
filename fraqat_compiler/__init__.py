"""Graph compiler: trained PyTorch models to packed INT4/INT8 for phone NPUs, with fractional-bit fine-tuning."""
