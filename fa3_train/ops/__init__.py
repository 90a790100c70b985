"""Differentiable operators: public functions, torch.ops registration, autograd, backends."""
