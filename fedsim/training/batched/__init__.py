"""C clients trained as one batch of networks: what a client does, for `torch.func.vmap` over many of them."""
