"""The training loop: batches of packed documents, one captured CUDA graph a step, experts balanced by their biases."""

import time

import numpy as np
import torch
import torch.nn.functional as F

import batches
import data
from model import Nano, masked_attention
from optimize import Optimizer

LONGEST = 512


def to_device(made, device):
    t = {k: torch.from_numpy(v) for k, v in made.items() if isinstance(v, np.ndarray)}
    return {k: (v if k == "cut" else v.long()).to(device, non_blocking=True) for k, v in t.items()}


def loss_of(model, b):
    logits, load = model(b["ids"], b["positions"], b["cut"], LONGEST, b["places"])
    return F.cross_entropy(logits.float(), b["targets"], ignore_index=-1, reduction="sum"), load, logits


class Step:
    """One optimizer step on static tensors, captured as a graph on CUDA."""

    def __init__(self, model, optimizer, example, compiled, graph):
        self.model, self.optimizer = model, optimizer
        self.buffers = {k: v.clone() for k, v in example.items()}
        self.speed = torch.zeros((), device=model.embed.device)
        self.loss = torch.zeros((), device=model.embed.device)
        self.forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        self.graph = None
        if graph:
            self.capture()

    def capture(self):
        """The graph of a step. The steps that warm it up leave no trace."""
        model = self.model
        state = [t.detach().clone() for t in self.state()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        for p in model.parameters():
            p.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self.run(True)
        self.graph = graph
        with torch.no_grad():
            for t, old in zip(self.state(), state):
                t.copy_(old)

    def state(self):
        o, m = self.optimizer, self.model
        return [*m.parameters(), m.bias, m.load, *o.momentum, *o.first, *o.second, o.steps]

    def run(self, capturing=False):
        m = self.model
        if not capturing:
            for p in m.parameters():
                p.grad = None
        loss, load, _ = self.forward(m, self.buffers)
        count = (self.buffers["targets"] >= 0).sum()
        (loss / count).backward()
        self.optimizer.step()
        with torch.no_grad():
            self.loss.copy_(loss / count)
            m.bias += self.speed * torch.sign(load.mean(1, keepdim=True) - load)
            m.load.lerp_(load / load.mean(1, keepdim=True), 0.05)

    def __call__(self, b):
        for k, v in b.items():
            self.buffers[k].copy_(v, non_blocking=True)
        if self.graph:
            self.graph.replay()
        else:
            self.run()


def held_batches(tokenizer, seed, each, shape):
    """{kind: batches of held-out documents}"""
    made = {}
    for kind in data.KINDS:
        rng = data.generator(seed, "held", kind)
        docs = [batches.encode(tokenizer, data.held_document(kind, rng)) for _ in range(each)]
        docs = [d for d in docs if len(d[0]) <= LONGEST]
        made[kind] = []
        while docs:
            made[kind].append(batches.pack(docs, *shape))
    return made


@torch.no_grad()
def evaluate(model, held, qat):
    """{kind: (share of documents that greedy decoding gets wholly right, loss per token)}"""
    old, out = model.qat.clone(), {}
    model.qat.fill_(qat)
    for kind, made in held.items():
        right = total = loss = count = 0
        for b in made:
            t = to_device(b, model.embed.device)
            s, _, logits = loss_of(model, t)
            wrong = (logits.argmax(-1) != t["targets"]) & (t["targets"] >= 0)
            bad = torch.zeros(b["documents"] + 1, device=logits.device).index_add_(0, t["owner"].clamp_min(0), wrong.float())
            right += int((bad[:b["documents"]] == 0).sum())
            total += b["documents"]
            loss += float(s)
            count += int((t["targets"] >= 0).sum())
        out[kind] = (right / total, loss / count)
    model.qat.copy_(old)
    return out


def shares(p):
    """Of the run's course p in 0..1: the learning rate's share of its peak, the biases' speed, quantisation."""
    rate = min(1, p / 0.01 + 0.02) * (1 if p < 0.45 else max(0.0, (1 - p) / 0.55))
    speed = 0.002 if p < 0.3 else 0.001 if p < 0.6 else 0.0003
    return rate, speed, float(p >= 0.6)


def train(model, stream, held, options, log):
    """Runs for options.steps, or until options.seconds have gone by since `options.start`."""
    device = model.embed.device
    optimizer = Optimizer(model, options.muon_rate, options.adam_rate)
    begin = time.time()
    step = Step(model, optimizer, to_device(stream.get(), device), options.compile, options.graph)
    log(f"prepared in {time.time() - begin:.1f} s, {stream.ready()} batches ahead")
    begin = last = time.time()
    end = options.start + options.seconds
    marks, i, tokens, seen = list(options.evaluate), 0, 0, 0
    while True:
        p = i / options.steps if options.steps else (time.time() - begin) / (end - begin)
        if p >= 1:
            break
        made = stream.get()
        rate, speed, qat = shares(p)
        optimizer.share.fill_(rate)
        step.speed.fill_(speed)
        model.qat.fill_(qat)
        step(to_device(made, device))
        tokens += made["used"]
        i += 1
        if i % options.report == 0:
            loss, now = float(step.loss), time.time()
            high = model.load.max(1).values.tolist()
            log(f"step {i} {p:.3f} loss {loss:.4f} tokens {tokens / 1e6:.1f}M {(tokens - seen) / (now - last) / 1e6:.2f}M/s "
                f"ahead {stream.ready()} load max {' '.join(f'{h:.2f}' for h in high)} min {float(model.load.min()):.2f}")
            last, seen = now, tokens
            if not loss < 20:
                raise SystemExit("the loss is not a number")
        if marks and p >= marks[0]:
            marks.pop(0)
            report(log, f"held out at {p:.2f}", evaluate(model, held, qat))
    for name, qat in (("bf16", 0.0), ("int4", 1.0)):
        report(log, name, evaluate(model, held, qat))
    return {"steps": i, "tokens": tokens, "seconds": time.time() - begin}


def report(log, name, results):
    log(f"{name}: " + "; ".join(f"{kind} {right:.4f} loss {loss:.5f}" for kind, (right, loss) in results.items()))


def check_attention(model, b, log):
    """The fast attention against one big mask, on the first documents of a batch."""
    cut = b["cut"][:9].contiguous()
    c, g = model.c, torch.Generator().manual_seed(1)
    make = lambda width: torch.randn(int(cut[-1]), c["num_attention_heads"], width, generator=g).bfloat16().to(cut.device)
    wide = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    q, k, v = make(wide), make(wide), make(c["v_head_dim"])
    one, two = (f(q, k, v, cut, LONGEST, model.scale).float() for f in (model.attention, masked_attention))
    error = float((one - two).norm() / two.norm())
    log(f"attention differs by {error:.1e}")
    if not error < 0.02:
        raise SystemExit("the fast attention is wrong")
