"""Evens the experts' load in a finished checkpoint: the auxiliary-loss-free rule, with the weights at rest.

Each round, kimi-serve scores fresh training documents and counts which experts their tokens chose; a bias
then moves by the logarithm of how far its expert is from the mean.
"""

import json
import os
import struct
import subprocess
import tempfile

import numpy as np

import data
from render import render


def documents(tokenizer, index):
    rng = data.generator(100, "load", index)
    for i in range(700):
        doc = data.training_document(rng)
        ids, _ = render(doc["messages"], doc["tools"], doc["thinking"], False).ids(tokenizer)
        yield json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions",
                          "body": {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}}) + "\n"


def balance(tokenizer, options):
    with open(os.path.join(options.model, "model.safetensors"), "r+b") as f, tempfile.TemporaryDirectory() as temp:
        size = struct.unpack("<Q", f.read(8))[0]
        header, places, bias = json.loads(f.read(size)), {}, {}
        for name, entry in header.items():
            if name.endswith("e_score_correction_bias"):
                layer = int(name.split(".layers.")[1].split(".")[0])
                places[layer] = 8 + size + entry["data_offsets"][0]
                f.seek(places[layer])
                bias[layer] = np.frombuffer(f.read(4 * entry["shape"][0]), np.float32).copy()
        counts = os.path.join(temp, "counts")
        for i in range(options.rounds):
            subprocess.run([options.serve, "--model-path", options.model, "--batch", "--quiet", "--device", "cpu", "--context-length", "4096", "--max-total-tokens",
                            "65536", "--disable-radix-cache", "--expert-stats", counts], input="".join(documents(tokenizer, i)), text=True,
                           stdout=subprocess.DEVNULL, check=True)
            line = []
            with open(counts) as made:
                layers = json.load(made)["layers"]
            for entry in layers:
                share = np.array(entry["counts"]) / np.mean(entry["counts"])
                line.append(f"{share.min():.2f} to {share.max():.2f}")
                step = options.rate * (1 - i / options.rounds)
                bias[entry["layer"]] -= (step * np.clip(np.log((share + 1e-3) / (1 + 1e-3)), -2, 2)).astype(np.float32)
                f.seek(places[entry["layer"]])
                f.write(bias[entry["layer"]].tobytes())
            f.flush()
            print(f"round {i}: " + "; ".join(line), flush=True)
