"""Documents packed into batches of a fixed number of tokens, made by worker processes.

A batch: ids [T], the documents' starts [D + 1] (the rest of D empty), positions in the document [T],
where the model is to predict [L] and what [L]. Batch i is the same whichever worker makes it.
"""

import multiprocessing

import numpy as np

import data
from render import render


def encode(tokenizer, doc):
    ids, loss = render(doc["messages"], doc["tools"], doc["thinking"], False).ids(tokenizer)
    return np.array(ids, np.int64), np.array([i for i in range(1, len(ids)) if loss[i]], np.int64)


def pack(docs, tokens, room, most):
    """docs: (ids, predicted places), as many as fit are taken off the front."""
    ids, starts, places, targets = np.zeros(tokens, np.int64), [0], [], []
    predicted, owner = 0, []
    while docs and len(starts) < most:
        doc, marks = docs[0]
        start = starts[-1]
        if start + len(doc) > tokens or predicted + len(marks) > room:
            break
        docs.pop(0)
        ids[start:start + len(doc)] = doc
        places.append(start + marks - 1)
        targets.append(doc[marks])
        owner.append(np.full(len(marks), len(starts) - 1))
        predicted += len(marks)
        starts.append(start + len(doc))
    used = starts[-1]
    starts = np.array(starts)
    positions = np.arange(tokens)
    positions[:used] -= np.repeat(starts[:-1], np.diff(starts))
    positions[used:] = 0
    # Padding is documents of zeros, none of them long: attention must write every row.
    pads = list(range(used + 512, tokens, 512)) + [tokens]
    cut = np.concatenate([starts, pads, np.full(most + 8, tokens)])[:most + 8]
    fill = np.full(room - predicted, -1)
    return {"ids": ids, "cut": cut.astype(np.int32), "positions": positions,
            "places": np.concatenate(places + [np.zeros(room - predicted, np.int64)]),
            "targets": np.concatenate(targets + [fill]), "owner": np.concatenate(owner + [fill]), "documents": len(starts) - 1, "used": used}


def batch(tokenizer, seed, index, shape):
    rng, docs, total = data.generator(seed, "batch", index), [], 0
    while total < shape[0] + 600:
        ids, marks = encode(tokenizer, data.training_document(rng))
        if len(ids) <= 512:
            docs.append((ids, marks))
            total += len(ids)
    return pack(docs, *shape)


def work(tokenizer, seed, first, stride, shape, queue):
    index = first
    while True:
        queue.put({k: v.astype(np.int32) if isinstance(v, np.ndarray) else v for k, v in batch(tokenizer, seed, index, shape).items()})
        index += stride


class Stream:
    """Batches 0, 1, 2, ... from `workers` processes, which must be started before CUDA is."""

    def __init__(self, tokenizer, seed, shape, workers, ahead=96):
        context = multiprocessing.get_context("fork")
        self.queues, self.next = [context.Queue(ahead) for _ in range(workers)], 0
        self.processes = [context.Process(target=work, args=(tokenizer, seed, i, workers, shape, q), daemon=True) for i, q in enumerate(self.queues)]
        for p in self.processes:
            p.start()

    def get(self):
        made = self.queues[self.next % len(self.queues)].get()
        self.next += 1
        return made

    def ready(self):
        return sum(q.qsize() for q in self.queues)

    def stop(self):
        for p in self.processes:
            p.terminate()
