"""The model in PyTorch: DeepSeek-V3's, with weights of all layers of a kind in one tensor, so that a step is few large operations."""

import inspect
import math

import torch
import torch.nn.functional as F

CONFIG = dict(vocab_size=2560, hidden_size=128, intermediate_size=512, moe_intermediate_size=32, num_hidden_layers=5,
              num_attention_heads=4, n_shared_experts=1, n_routed_experts=384, num_experts_per_tok=8, first_k_dense_replace=1,
              kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, routed_scaling_factor=2.827,
              rms_norm_eps=1e-6, rope_theta=50000.0, factor=64.0, beta_fast=32.0, beta_slow=1.0, original=4096)
GROUP = 32


def yarn(c):
    d = c["qk_rope_head_dim"]
    base = c["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    corr = lambda r: d * math.log(c["original"] / (2 * math.pi * r)) / (2 * math.log(c["rope_theta"]))
    low, high = max(math.floor(corr(c["beta_fast"])), 0), min(math.ceil(corr(c["beta_slow"])), d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / c["factor"] * ramp + base * (1 - ramp)


def fake_int4(w):
    """What symmetric int4 in groups of 32 columns makes of w, with bf16 scales."""
    groups = w.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)


class Pick(torch.autograd.Function):
    """Rows of x for every (token, expert) in the order of experts. The gradient is a gather, not a scatter."""

    @staticmethod
    def forward(ctx, x, order, back, top):
        ctx.save_for_backward(back)
        ctx.top = top
        return x[order // top]

    @staticmethod
    def backward(ctx, g):
        back, = ctx.saved_tensors
        return g[back].view(-1, ctx.top, g.shape[-1]).sum(1), None, None, None


class Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order, back):
        ctx.save_for_backward(order)
        return y[back]

    @staticmethod
    def backward(ctx, g):
        order, = ctx.saved_tensors
        return g[order], None, None


class Take(torch.autograd.Function):
    """h[places], where only places that nothing is asked of come twice: their gradients are zero."""

    @staticmethod
    def forward(ctx, h, places):
        ctx.save_for_backward(places)
        ctx.rows = len(h)
        return h[places]

    @staticmethod
    def backward(ctx, g):
        places, = ctx.saved_tensors
        return g.new_zeros(ctx.rows, g.shape[1]).index_copy(0, places, g), None


def largest(s, count):
    """The columns of the `count` largest of each row: what torch.topk gives, several times as fast here."""
    columns, found = torch.arange(s.shape[1], device=s.device), []
    for _ in range(count):
        found.append(s.argmax(1))
        s = torch.where(columns == found[-1][:, None], -torch.inf, s)
    return torch.stack(found, 1)


def linear(x, w):
    return F.linear(x, w.bfloat16().to(x.dtype))


def norm(x, w, eps, to):
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w.bfloat16().float()).to(to)


try:
    from torch.nn.attention.varlen import varlen_attn
    VARLEN = inspect.signature(varlen_attn).parameters
except ImportError:
    VARLEN = {}
CAUSAL = {"is_causal": True} if "is_causal" in VARLEN else {"window_size": (-1, 0)}
SCALES = "scale" in VARLEN


def varlen_attention(q, k, v, cut, longest, scale):
    """Flash attention; its heads are as wide for values as for keys."""
    width = v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - width))
    if SCALES:
        a = varlen_attn(q, k, v, cut, cut, longest, longest, scale=scale, **CAUSAL)
    else:
        a = varlen_attn(q * (scale * q.shape[-1] ** 0.5), k, v, cut, cut, longest, longest, **CAUSAL)
    return a[..., :width]


def masked_attention(q, k, v, cut, longest, scale):
    """The same for small batches: one big mask."""
    t = torch.arange(len(q), device=q.device)
    doc = torch.searchsorted(cut[:-1].contiguous(), t.int(), right=True)
    mask = (doc[:, None] == doc[None]) & (t[:, None] >= t[None])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


class Nano(torch.nn.Module):
    def __init__(self, config=CONFIG, seed=26, attention=varlen_attention, experts="grouped", low=torch.bfloat16):
        super().__init__()
        self.c, self.attention, self.experts, self.low, c = config, attention, experts, low, config
        g = torch.Generator().manual_seed(seed)
        layers, moe = c["num_hidden_layers"], c["num_hidden_layers"] - 1
        h, heads, inner, e = c["hidden_size"], c["num_attention_heads"], c["moe_intermediate_size"], c["n_routed_experts"]
        rope, nope, vd = c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"]
        p = lambda *shape, std: torch.nn.Parameter(torch.randn(*shape, generator=g) * std)
        m = lambda *shape, gain=1.0: p(*shape, std=gain * shape[-1] ** -0.5)
        out = (2 * layers) ** -0.5
        ones = lambda *shape: torch.nn.Parameter(torch.ones(*shape))
        self.embed, self.head = p(c["vocab_size"], h, std=0.3), p(c["vocab_size"], h, std=0.02)
        self.norm, self.norm_in, self.norm_post = ones(h), ones(layers, h), ones(layers, h)
        self.norm_q, self.norm_kv = ones(layers, c["q_lora_rank"]), ones(layers, c["kv_lora_rank"])
        self.q_a, self.q_b = m(layers, c["q_lora_rank"], h), m(layers, heads * (nope + rope), c["q_lora_rank"])
        self.kv_a, self.kv_b = m(layers, c["kv_lora_rank"] + rope, h), m(layers, heads * (nope + vd), c["kv_lora_rank"])
        self.o = m(layers, h, heads * vd, gain=out)
        self.dense_in, self.dense_out = m(2, c["intermediate_size"], h), m(h, c["intermediate_size"], gain=out)
        self.shared_in, self.shared_out = m(moe, 2, inner, h), m(moe, h, inner, gain=out)
        self.router = m(moe, e, h, gain=0.5)
        self.expert_in, self.expert_out = m(moe, e, 2, inner, h), m(moe, e, h, inner, gain=out)
        self.register_buffer("bias", torch.zeros(moe, e))
        self.register_buffer("load", torch.zeros(moe, e), persistent=False)
        self.register_buffer("qat", torch.zeros(()), persistent=False)
        self.register_buffer("inv_freq", yarn(c).float(), persistent=False)
        self.scale = (nope + rope) ** -0.5 * (0.1 * math.log(c["factor"]) + 1) ** 2

    def expert_weights(self):
        """bf16 for the products; a share `qat` of the way to int4, straight through."""
        return [(w + self.qat * (fake_int4(w) - w).detach()).to(self.low) for w in (self.expert_in, self.expert_out)]

    def turn(self, x, cos, sin):
        a, b = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)

    def attend(self, l, x, cos, sin, cut, longest):
        c, t = self.c, len(x)
        heads, nope, rope, vd = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        q = linear(norm(linear(x, self.q_a[l]), self.norm_q[l], c["rms_norm_eps"], self.low), self.q_b[l]).view(t, heads, nope + rope)
        kv, k_pe = linear(x, self.kv_a[l]).split((c["kv_lora_rank"], rope), -1)
        kv = linear(norm(kv, self.norm_kv[l], c["rms_norm_eps"], self.low), self.kv_b[l]).view(t, heads, nope + vd)
        k_pe = self.turn(k_pe[:, None], cos, sin).expand(t, heads, rope)
        q = torch.cat((q[..., :nope], self.turn(q[..., nope:], cos, sin)), -1)
        k = torch.cat((kv[..., :nope], k_pe), -1)
        a = self.attention(q, k, kv[..., nope:].contiguous(), cut, longest, self.scale)
        return linear(a.reshape(t, heads * vd), self.o[l])

    def mlp(self, x, w_in, w_out):
        return linear(F.silu(linear(x, w_in[0])) * linear(x, w_in[1]), w_out)

    def route(self, m, x):
        c = self.c
        s = torch.sigmoid(F.linear(x.float(), self.router[m].bfloat16().float()))
        chosen = largest(s.detach() + self.bias[m], c["num_experts_per_tok"])
        w = s.gather(1, chosen)
        return chosen, w / (w.sum(1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]

    def routed(self, m, x, w_in, w_out):
        c, e, top = self.c, self.c["n_routed_experts"], self.c["num_experts_per_tok"]
        chosen, weight = self.route(m, x)
        ordered, order = torch.sort(chosen.flatten().int())
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        ends = torch.searchsorted(ordered, torch.arange(e, device=x.device, dtype=torch.int32), right=True)
        load = ends.diff(prepend=ends.new_zeros(1))
        rows = Pick.apply(x, order, back, top)
        w_in = w_in.flatten(1, 2)
        if self.experts == "grouped":
            both = torch._grouped_mm(rows, w_in.transpose(1, 2), offs=ends.int())
            gate, up = both.chunk(2, -1)
            y = torch._grouped_mm((F.silu(gate) * up).contiguous(), w_out.transpose(1, 2), offs=ends.int())
        else:
            room = len(rows) * 5 // 2 // e // 8 * 8 + 8
            place = torch.arange(len(rows), device=x.device) - (ends - load)[ordered]
            fits = place < room
            slot = torch.where(fits, ordered * room + place, e * room)
            boxes = x.new_zeros(e * room + 1, rows.shape[1]).index_copy(0, slot, rows)[:-1].view(e, room, -1)
            gate, up = torch.bmm(boxes, w_in.transpose(1, 2)).chunk(2, -1)
            y = torch.bmm(F.silu(gate) * up, w_out.transpose(1, 2)).view(e * room, -1)
            y = torch.where(fits[:, None], y[slot.clamp_max(e * room - 1)], 0)
        y = Reorder.apply(y, order, back).view(len(x), top, -1)
        return (y.float() * weight[..., None]).sum(1), load

    def forward(self, ids, positions, cut, longest, places):
        c = self.c
        h = F.embedding(ids, self.embed).bfloat16().float()
        angle = positions[:, None, None] * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        w_in, w_out = self.expert_weights()
        loads = []
        for l in range(c["num_hidden_layers"]):
            h = h + self.attend(l, norm(h, self.norm_in[l], c["rms_norm_eps"], self.low), cos, sin, cut, longest)
            x, m = norm(h, self.norm_post[l], c["rms_norm_eps"], self.low), l - 1
            if l == 0:
                h = h + self.mlp(x, self.dense_in, self.dense_out)
            else:
                y, load = self.routed(m, x, w_in[m], w_out[m])
                loads.append(load)
                h = h + y + self.mlp(x, self.shared_in[m], self.shared_out[m])
        logits = F.linear(norm(Take.apply(h, places), self.norm, c["rms_norm_eps"], self.low), self.head.bfloat16().to(self.low))
        return logits, torch.stack(loads).float()
