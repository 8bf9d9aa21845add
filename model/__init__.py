"""The model: decoder, attention, RoPE, loss, KV cache and the Hugging Face bridge."""
