"""The vocabulary: a byte-pair encoding in which a word is spelled the same wherever it stands.

A value goes from the request (" Paris") into JSON ("Paris"), and a small model should copy it token by token.
So merges of letters come first, and a word joins the space before it last, and only for the commonest words.
Digits stay single.
"""

import base64
import collections
import json
import re

from render import BLOCK, SPECIAL

BASE = 2304
SPACED, MARKS = 440, 90


def merge_most(counts, known, wanted):
    """Adds `wanted` tokens: the commonest pair of neighbours, joined, again and again."""
    words = [[list(bytes([b]) for b in word), n] for word, n in counts.items()]
    pairs = collections.Counter()
    where = collections.defaultdict(set)
    for i, (parts, n) in enumerate(words):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += n
            where[pair].add(i)
    while wanted and pairs:
        pair, n = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if n < 2:
            break
        joined = pair[0] + pair[1]
        if joined not in known:
            known[joined] = len(known)
            wanted -= 1
        for i in where.pop(pair):
            parts, count = words[i]
            for p in zip(parts, parts[1:]):
                pairs[p] -= count
                if not pairs[p]:
                    del pairs[p]
            k = 0
            while k + 1 < len(parts):
                if (parts[k], parts[k + 1]) == pair:
                    parts[k:k + 2] = [joined]
                k += 1
            for p in zip(parts, parts[1:]):
                pairs[p] += count
                where[p].add(i)
        pairs.pop(pair, None)


def build(texts):
    letters, marks, spaced = collections.Counter(), collections.Counter(), collections.Counter()
    for text in texts:
        letters.update(re.findall("[A-Z]*[a-z]+|[A-Z]+", text))
        marks.update(re.findall(r" ?[^\sA-Za-z0-9]+\n*|\s*\n+|  +", text))
        spaced.update(re.findall(r"(?<= )[a-z]+|(?<= )[A-Z][a-z]*", text))
    known = {bytes([b]): b for b in range(256)}
    count = lambda c: {k.encode(): n for k, n in c.items()}
    merge_most(count(letters), known, BASE - 256 - SPACED - MARKS)
    merge_most(count(marks), known, MARKS)
    for word, _ in spaced.most_common():
        token = word.encode()
        if len(known) < BASE and token in known and word.islower():
            known[b" " + token] = len(known)
    assert len(known) == BASE
    return known


def save(known, folder):
    with open(folder + "/tiktoken.model", "w") as f:
        for token, rank in sorted(known.items(), key=lambda item: item[1]):
            f.write(f"{base64.b64encode(token).decode()} {rank}\n")
    base = len(known)
    added = {str(base + offset): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                                  "special": special} for offset, (name, special) in SPECIAL.items()}
    config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "unk_token": "[UNK]",
              "clean_up_tokenization_spaces": False, "model_max_length": 1000000000000000019884624838656, "tokenizer_class": "TikTokenTokenizer"}
    with open(folder + "/tokenizer_config.json", "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")
    return base + BLOCK
