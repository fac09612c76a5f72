"""Muon for the matrices of the layers, Adam for the rest; the learning rate is a tensor, so that a captured step follows it."""

import torch


def orthogonal(g):
    """Five steps of Newton and Schulz on a stack of matrices, in bf16."""
    x = g.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide else x.mT).float()


class Optimizer:
    def __init__(self, model, muon_rate, adam_rate, decay=0.02):
        rest = ("embed", "head", "router")
        named = list(model.named_parameters())
        self.muon = [p for n, p in named if p.ndim >= 2 and not n.startswith("norm") and n not in rest]
        self.adam = [p for n, p in named if p.ndim < 2 or n.startswith("norm") or n in rest]
        device = self.muon[0].device
        self.muon_rate, self.adam_rate, self.decay = muon_rate, adam_rate, decay
        self.momentum = [torch.zeros_like(p) for p in self.muon]
        self.first = [torch.zeros_like(p) for p in self.adam]
        self.second = [torch.zeros_like(p) for p in self.adam]
        self.share = torch.zeros((), device=device)  # of the peak rates
        self.steps = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for p, m in zip(self.muon, self.momentum):
            m.lerp_(p.grad, 0.05)
            u = orthogonal(p.grad.lerp(m, 0.95))
            rate = self.share * self.muon_rate
            p.mul_(1 - rate * self.decay)
            p.sub_(u * (rate * 0.2 * max(p.shape[-2:]) ** 0.5))
        rate = self.share * self.adam_rate
        for p, m, v in zip(self.adam, self.first, self.second):
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.02)
            p.sub_(rate * (m / (1 - 0.9 ** self.steps)) / ((v / (1 - 0.98 ** self.steps)).sqrt() + 1e-8))
