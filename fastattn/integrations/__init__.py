"""What switches other people's code to this library: PyTorch, transformers, and code written for flash_attn.

Nothing here acts on import; every switch is a call, and every call has one that takes it back.
"""
