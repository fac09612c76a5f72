"""K2.5's chat template and tool declarations, as much of them as the training data uses, and the ids.

libcore/text/chat.c and tools_ts.c are what serves the model; tests/test_nano.c holds that both give the
same ids for tests/data/nano/prompts.jsonl, which this wrote.
"""

import base64
import json

import tiktoken

UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + END,
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + END,
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])

# Kimi's names at Kimi's offsets behind the ranks; True: special, so left out of decoded text.
SPECIAL = {0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True), 3: ("<|im_user|>", True),
           4: ("<|im_assistant|>", True), 6: ("<|start_header_id|>", True), 7: ("<|end_header_id|>", True),
           9: ("[EOT]", True), 10: ("<|im_system|>", True), 11: ("<|tool_calls_section_begin|>", False),
           12: ("<|tool_calls_section_end|>", False), 13: ("<|tool_call_begin|>", False),
           14: ("<|tool_call_argument_begin|>", False), 15: ("<|tool_call_end|>", False),
           17: ("<|im_middle|>", True), 18: ("<|media_begin|>", True), 19: ("<|media_content|>", True),
           20: ("<|media_end|>", True), 21: ("<|media_pad|>", True), 22: ("<think>", False),
           23: ("</think>", False), 254: ("[UNK]", True), 255: ("[PAD]", True)}
BLOCK = 256


class Tokenizer:
    def __init__(self, ranks):
        self.ranks, self.base = ranks, len(ranks)
        self.special = {name: self.base + offset for offset, (name, _) in SPECIAL.items()}
        self.encoding = tiktoken.Encoding("nano", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.vocab = self.base + BLOCK

    @classmethod
    def load(cls, path):
        with open(path) as f:
            lines = [line.split() for line in f]
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    def encode(self, text):
        return self.encoding.encode_ordinary(text)


def type_of(schema):
    if "enum" in schema:
        return " | ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in schema["enum"])
    return {"integer": "number"}.get(schema["type"], schema["type"])


def declare(tools):
    """Moonshot's TypeScript, for flat parameters with descriptions."""
    out = ["# Tools\n\n## functions\nnamespace functions {\n"]
    for tool in tools:
        f = tool["function"]
        if f.get("description"):
            out.append(f"// {f['description']}\n")
        parameters = f.get("parameters") or {}
        properties, required = parameters.get("properties") or {}, parameters.get("required") or []
        rows = []
        for name in sorted(properties, key=lambda n: (n not in required, n)):
            schema = properties[name]
            text = f"  // {schema['description']}\n" if schema.get("description") else ""
            rows.append(f"{text}  {name}{'' if name in required else '?'}: {type_of(schema)}")
        out.append(f"type {f['name']} = (_: {{" + ("\n" + ",\n".join(rows) + "\n" if rows else "") + "}) => any;\n")
    out.append("}\n")
    return "".join(out)


class Pieces:
    """Control tokens and plain text, neighbours of plain text joined; each with its part in the loss."""

    def __init__(self):
        self.list = []

    def put(self, text, control=False, loss=False):
        if not text:
            return
        if self.list and not control and not self.list[-1][1] and self.list[-1][2] == loss:
            self.list[-1][0] += text
        else:
            self.list.append([text, control, loss])

    def text(self):
        return "".join(p[0] for p in self.list)

    def ids(self, tokenizer):
        """(ids, which of them are to be predicted). A plain piece that joins another of a different
        part in the loss would be cut where serving does not cut; the template has no such place."""
        ids, loss = [], []
        for text, control, part in self.list:
            new = [tokenizer.special[text]] if control else tokenizer.encode(text)
            ids += new
            loss += [part] * len(new)
        return ids, loss


def render(messages, tools=None, thinking=True, prompt=True):
    """With `prompt`, messages end before the answer; without, the last ones are the answer and are
    what the model learns to say."""
    p = Pieces()
    if tools:
        p.put("<|im_system|>", True)
        p.put("tool_declare")
        p.put("<|im_middle|>", True)
        p.put(declare(tools))
        p.put("<|im_end|>", True)
    history = 0
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and not m.get("tool_calls") and (prompt or i + 1 < len(messages)):
            history = i + 1
    for i, m in enumerate(messages):
        role = m["role"]
        p.put({"user": "<|im_user|>", "assistant": "<|im_assistant|>"}.get(role, "<|im_system|>"), True)
        p.put(role)
        p.put("<|im_middle|>", True)
        if role == "tool":
            p.put("## Return of " + m["tool_call_id"] + "\n" + m["content"])
            p.put("<|im_end|>", True)
        elif role == "assistant":
            put_answer(p, m, i < history or not thinking)
        else:
            p.put(m["content"])
            p.put("<|im_end|>", True)
    if prompt:
        p.put("<|im_assistant|>", True)
        p.put("assistant")
        p.put("<|im_middle|>", True)
        p.put("<think>", True)
        if not thinking:
            p.put("</think>", True)
    return p


def put_answer(p, m, silent):
    p.put("<think>", True)
    if not silent:
        p.put(m.get("reasoning_content") or "", loss=True)
    p.put("</think>", True, loss=not silent)
    p.put(m.get("content") or "", loss=True)
    if m.get("tool_calls"):
        p.put("<|tool_calls_section_begin|>", True, True)
        for call in m["tool_calls"]:
            p.put("<|tool_call_begin|>", True, True)
            p.put(call["id"], loss=True)
            p.put("<|tool_call_argument_begin|>", True, True)
            p.put(call["function"]["arguments"], loss=True)
            p.put("<|tool_call_end|>", True, True)
        p.put("<|tool_calls_section_end|>", True, True)
    p.put("<|im_end|>", True, True)


def call(name, index, arguments):
    return {"id": f"functions.{name}:{index}", "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)}}


def plain_texts(doc):
    """What of a document goes through the vocabulary, piece by piece."""
    p = render(doc["messages"], doc["tools"], doc["thinking"], False)
    return [text for text, control, _ in p.list if not control]
