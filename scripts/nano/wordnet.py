"""Common English nouns and short definitions from WordNet 3.0 (Debian's wordnet-base)."""

import os
import re


def read(folder="/usr/share/wordnet"):
    """([noun, ...], [(word, gloss), ...]): words of 3 to 10 letters, counted in WordNet's own texts."""
    counts, first = {}, {}
    with open(os.path.join(folder, "index.sense")) as f:
        for line in f:
            key, offset, sense, count = line.split()
            word, rest = key.split("%")
            if rest.startswith("1:") and re.fullmatch("[a-z]{3,10}", word):
                counts[word] = counts.get(word, 0) + int(count)
                if sense == "1":
                    first[word] = offset
    glosses = {}
    with open(os.path.join(folder, "data.noun"), encoding="latin-1") as f:
        for line in f:
            if line[0] != " ":
                gloss = line.split(" | ")[1].split(";")[0].strip()
                glosses[line.split(" ")[0]] = re.sub(r"\s+", " ", gloss)
    nouns = sorted((w for w in counts if counts[w] >= 3), key=lambda w: (-counts[w], w))[:3000]
    good = [(w, glosses[first[w]]) for w in nouns if w in first and 10 <= len(glosses[first[w]]) <= 70
            and re.fullmatch(r"[a-z ,'-]+", glosses[first[w]])]
    return nouns, good[:800]
