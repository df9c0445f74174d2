"""Training of C clients as one batch of networks, by `torch.func.vmap` over the clients."""
