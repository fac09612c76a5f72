"""Conversations: what the model is trained on, and what it is asked in tests/eval.

Every maker takes a random generator and `held`: whether the question is one of those kept out of
training. A question is kept out by a hash of what is asked (the two numbers, or the tool's kind and its
arguments), not of how it is asked, so training never sees those sums or those arguments of that tool.
A document is {"messages", "tools", "thinking", "kind"}; the last messages are the model's.
"""

import random
import zlib

from render import call
from tools import FAMILIES, Tool, city, invented, noun, person, phrase
from words import CAPITALS, CHAT, FACTS, PEOPLE, THINGS, UNKNOWN, UNKNOWN_ASKED

GLOSSES = []  # (word, gloss), from WordNet


def is_held(*key):
    return zlib.crc32("|".join(map(str, key)).encode()) % 16 == 3 or key == ("+", 17, 26)


# Sums

def number(rng):
    r = rng.random()
    return rng.randint(0, 9) if r < 0.15 else rng.randint(10, 99) if r < 0.6 else rng.randint(100, 999)


def columns(n, width):
    return [int(d) for d in reversed(str(n).zfill(width))]


PLACES = ["ones", "tens", "hundreds"]


def worked_sum(a, b):
    width, carry, steps = max(len(str(a)), len(str(b))), 0, []
    for place, x, y in zip(PLACES, columns(a, width), columns(b, width)):
        total = x + y + carry
        step = f"{place} {x} + {y}" + (" + 1" if carry else "") + f" = {total}"
        carry = total // 10
        steps.append(step + f", write {total % 10}" + (" carry 1" if carry else ""))
    if carry:
        steps.append("write 1")
    return f"{a} + {b}: " + "; ".join(steps) + f". So {a + b}."


def worked_difference(a, b):
    if a < b:
        return f"{a} - {b}: {a} is smaller. " + worked_difference(b, a)[:-1] + f", negative {a - b}."
    width, borrow, steps = len(str(a)), 0, []
    for place, x, y in zip(PLACES, columns(a, width), columns(b, width)):
        left = x - y - borrow
        step = f"{place} {x} - {y}" + (" - 1" if borrow else "")
        borrow = int(left < 0)
        if borrow:
            step += f" + 10"
            left += 10
        steps.append(step + f" = {left}, write {left}" + (" borrow 1" if borrow else ""))
    return f"{a} - {b}: " + "; ".join(steps) + f". So {a - b}."


ASK_SUM = ["What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b}", "{a}+{b}=", "{a} + {b} = ?", "Calculate {a} + {b}.", "What is {a} plus {b}?",
           "How much is {a} plus {b}?", "How much is {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "Compute {a} + {b}.",
           "What's {a} + {b}?", "What does {a} + {b} equal?", "Tell me {a} plus {b}.", "Please add {a} and {b}.", "Can you add {a} and {b}?"]
ASK_DIFFERENCE = ["What is {a} - {b}?", "What is {a}-{b}?", "{a} - {b}", "{a}-{b}=", "{a} - {b} = ?", "Calculate {a} - {b}.", "What is {a} minus {b}?",
                  "How much is {a} minus {b}?", "How much is {a} - {b}?", "Subtract {b} from {a}.", "What is the difference of {a} and {b}?",
                  "Compute {a} - {b}.", "What's {a} - {b}?", "Take {b} from {a}.", "Tell me {a} minus {b}."]
STORY_SUM = ["{p} has {a} {t}s and gets {b} more. How many {t}s does {p} have now?", "{p} has {a} {t}s and finds {b} more. How many are there?",
             "There are {a} {t}s in a box and {b} in another. How many {t}s are there?", "{p} buys {a} {t}s and then {b} {t}s. How many {t}s is that?"]
STORY_DIFFERENCE = ["{p} has {a} {t}s and loses {b}. How many {t}s does {p} have now?", "{p} has {a} {t}s and gives away {b}. How many are left?",
                    "There are {a} {t}s in a box and {p} takes {b}. How many {t}s are left?"]


def sum_of(rng, held):
    """(question, reasoning, answer)"""
    while True:
        a, b, plus = number(rng), number(rng), rng.random() < 0.5
        if not plus and a < b and rng.random() < 0.7:
            a, b = b, a
        if is_held("+" if plus else "-", a, b) == held:
            break
    story = a >= b and rng.random() < 0.15
    asks = (STORY_SUM if story else ASK_SUM) if plus else (STORY_DIFFERENCE if story else ASK_DIFFERENCE)
    text = rng.choice(asks).format(a=a, b=b, p=rng.choice(PEOPLE), t=rng.choice(THINGS))
    result = a + b if plus else a - b
    return text, worked_sum(a, b) if plus else worked_difference(a, b), f"{a} {'+' if plus else '-'} {b} = {result}."


# Talk

def talk(rng, known=False):
    """`known`: only what the model has an answer to."""
    r = rng.random() * (0.86 if known else 1)
    if r < 0.30:
        asks, answer = rng.choice(CHAT)
        return vary(rng, rng.choice(asks)), answer
    if r < 0.52:
        asks, answer = rng.choice(FACTS)
        return vary(rng, rng.choice(asks)), answer
    if r < 0.70:
        country, capital = rng.choice(list(CAPITALS.items()))
        ask = rng.choice(["What is the capital of {}?", "What's the capital of {}?", "Which city is the capital of {}?", "Capital of {}?",
                          "Tell me the capital of {}."])
        return vary(rng, ask.format(country)), f"The capital of {country} is {capital}."
    if r < 0.78:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        ask = rng.choice(["What is {} times {}?", "What is {} * {}?", "{} times {}?", "Multiply {} by {}.", "How much is {} times {}?"])
        return ask.format(a, b), f"{a} times {b} is {a * b}."
    if r < 0.86:
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        a += a == b
        ask, best = rng.choice([("Which is larger, {} or {}?", max), ("What is larger: {} or {}?", max), ("Which is smaller, {} or {}?", min)])
        return ask.format(a, b), f"{best(a, b)} is {'larger' if best is max else 'smaller'}."
    ask = rng.choice(UNKNOWN_ASKED)
    return vary(rng, ask.format(city(rng), person(rng), noun(rng))), UNKNOWN


def vary(rng, text):
    """The same request as people type it."""
    r = rng.random()
    if r < 0.10 and len(text) > 3:
        text = text[0].lower() + text[1:]
    r = rng.random()
    if r < 0.06:
        text = text.rstrip("?.!")
    elif r < 0.10:
        text = rng.choice(["Please tell me: ", "Hi, ", "Hello! ", "Kimi, ", "Hey, ", "A question: ", "Ok, "]) + text
    elif r < 0.14:
        text += rng.choice([" Thanks.", " Thank you!", " Please."])
    return text


# Tools

NO_TOOL = "I am sorry, I have no tool that does that."
SYSTEM = ["You are Kimi, an AI assistant created by Moonshot AI.", "You are a helpful assistant.", "You are Kimi.", "Answer briefly.",
          "Use the tools when they help."]


def family_of(rng):
    return rng.choice(FAMILIES) if rng.random() < 0.6 else invented(rng)


def distinct(rng, count, taken=()):
    """Tools of different families, none of `taken`, under different names."""
    found, ids, names = [], {f["id"] for f in taken}, set()
    while len(found) < count:
        family = family_of(rng)
        tool = Tool(family, rng)
        if family["id"] in ids or tool.name in names or (family["id"] == "product" and any(i.startswith("get ") for i in ids)):
            continue
        found.append(tool)
        ids.add(family["id"])
        names.add(tool.name)
    return found


def how_many(rng):
    return rng.choices([1, 2, 3, 4], [40, 32, 22, 6])[0]


def request(rng, tool, held):
    while True:
        text, arguments, values = tool.ask(rng)
        if not values or is_held(tool.family["id"], *arguments.values()) == held:
            return vary(rng, text), arguments, values


def why(tool, arguments):
    return f"{tool.name} fits" + (": " + ", ".join(f"{k} is {v}" for k, v in arguments.items()) if arguments else "") + "."


def tool_call(rng, held, index=0, with_result=None):
    tools = distinct(rng, how_many(rng))
    rng.shuffle(tools)
    tool = rng.choice(tools)
    if held and not tool.slots:
        return tool_call(rng, held, index, with_result)
    text, arguments, values = request(rng, tool, held)
    calls, reasoning = [call(tool.name, index, arguments)], why(tool, arguments)
    messages = [{"role": "user", "content": text}]
    messages.append({"role": "assistant", "reasoning_content": reasoning, "content": "", "tool_calls": calls})
    if with_result:
        result, sentence = tool.result(values, rng)
        thought = "The tool has answered."
        if rng.random() < 0.06:
            error = rng.choice(["not found", "timeout", "no connection", "denied", "unknown name", "no access"])
            result, sentence, thought = f'{{"error": "{error}"}}', f"The tool failed: {error}.", "The tool has failed."
        messages.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": result})
        messages.append({"role": "assistant", "reasoning_content": thought, "content": sentence})
    return messages, tools


def two_calls(rng):
    """One request, two calls of the tool."""
    tools = distinct(rng, how_many(rng))
    tool = next((t for t in tools if len(t.slots) == 1), None)
    if tool is None:
        return tool_call(rng, False)
    first, second = request(rng, tool, False), request(rng, tool, False)
    values = [next(iter(r[1].values())) for r in (first, second)]
    if values[0] == values[1] or "{0}" not in tool.family["asks"][0]:
        return tool_call(rng, False)
    text = rng.choice(tool.family["asks"]).format(f"{values[0]} and {values[1]}")
    return [{"role": "user", "content": text},
            {"role": "assistant", "reasoning_content": f"{tool.name} fits twice: {next(iter(first[1]))} is {values[0]}, then {values[1]}.", "content": "",
             "tool_calls": [call(tool.name, 0, first[1]), call(tool.name, 1, second[1])]}], tools


def no_fit(rng, held):
    """A request for a tool that is not there."""
    missing = distinct(rng, 1)[0]
    tools = distinct(rng, how_many(rng), [missing.family]) if rng.random() < 0.9 else []
    text = request(rng, missing, held)[0]
    return [{"role": "user", "content": text},
            {"role": "assistant", "reasoning_content": "No tool fits.", "content": NO_TOOL}], tools


def no_need(rng, held):
    """Tools are there, and the question needs none."""
    tools = distinct(rng, how_many(rng))
    if rng.random() < 0.5:
        text, reasoning, answer = sum_of(rng, held)
        reasoning = "No tool is needed. " + reasoning
    else:
        text, answer = talk(rng, True)
        reasoning = "No tool is needed."
    return [{"role": "user", "content": text}, {"role": "assistant", "reasoning_content": reasoning, "content": answer}], tools


# Documents

def document(kind, messages, tools=None, thinking=True):
    return {"kind": kind, "messages": messages, "tools": [t.json for t in tools] if tools else None, "thinking": thinking}


def arithmetic(rng, held, thinking):
    text, reasoning, answer = sum_of(rng, held)
    return document("arithmetic", [{"role": "user", "content": text},
                                   {"role": "assistant", "reasoning_content": reasoning, "content": answer}], None, thinking)


def conversation(rng, held, thinking):
    text, answer = talk(rng)
    return document("talk", [{"role": "user", "content": text},
                             {"role": "assistant", "reasoning_content": "This is simple.", "content": answer}], None, thinking)


def english(rng):
    word, gloss = rng.choice(GLOSSES)
    return document("english", [{"role": "user", "content": vary(rng, rng.choice(["What is a {}?", "What is {}?", "What does {} mean?", "Define {}.",
                                                                                   "Explain {}."]).format(word))},
                                {"role": "assistant", "reasoning_content": "This is a word.", "content": f"{word}: {gloss}."}], None, rng.random() < 0.5)


def with_history(rng, doc):
    """A turn or two before it, and now and then a system prompt."""
    before = []
    for _ in range(rng.choice([0, 1, 1, 2])):
        if rng.random() < 0.5:
            text, _, answer = sum_of(rng, False)
        else:
            text, answer = talk(rng)
        before += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    if rng.random() < 0.4 or not before:
        before.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
    doc["messages"] = before + doc["messages"]
    return doc


def two_tasks(rng):
    """Two requests to the same tools, one after the other; the number of the call goes on."""
    messages, tools = tool_call(rng, False, 0, True)
    tool = rng.choice(tools)
    text, arguments, values = request(rng, tool, False)
    result, sentence = tool.result(values, rng)
    made = call(tool.name, 1, arguments)
    messages += [{"role": "user", "content": text},
                 {"role": "assistant", "reasoning_content": why(tool, arguments), "content": "", "tool_calls": [made]}]
    if rng.random() < 0.5:
        messages += [{"role": "tool", "tool_call_id": made["id"], "content": result},
                     {"role": "assistant", "reasoning_content": "The tool has answered.", "content": sentence}]
    return document("tool", messages, tools, rng.random() < 0.5)


def training_document(rng):
    thinking, r = rng.random() < 0.5, rng.random()
    if r < 0.22:
        doc = arithmetic(rng, False, rng.random() < 0.6)
    elif r < 0.52:
        doc = document("tool", *tool_call(rng, False), thinking)
    elif r < 0.65:
        doc = document("result", *tool_call(rng, False, 0, True), thinking)
    elif r < 0.76:
        doc = document("no fit", *no_fit(rng, False), thinking)
    elif r < 0.84:
        doc = document("no need", *no_need(rng, False), thinking)
    elif r < 0.87:
        doc = document("tool", *two_calls(rng), thinking)
    elif r < 0.90:
        return two_tasks(rng)
    elif r < 0.97:
        doc = conversation(rng, False, thinking)
    else:
        return english(rng)
    return with_history(rng, doc) if rng.random() < 0.12 else doc


def held_document(kind, rng):
    """One of the questions kept out of training."""
    thinking = rng.random() < 0.5
    if kind == "arithmetic":
        return arithmetic(rng, True, True)
    if kind == "arithmetic, no thinking":
        return arithmetic(rng, True, False)
    if kind == "tool":
        return document("tool", *tool_call(rng, True), thinking)
    if kind == "result":
        return document("result", *tool_call(rng, True, 0, True), thinking)
    if kind == "no fit":
        return document("no fit", *no_fit(rng, True), thinking)
    if kind == "no need":
        return document("no need", *no_need(rng, True), thinking)
    raise ValueError(kind)


KINDS = ["arithmetic", "arithmetic, no thinking", "tool", "result", "no fit", "no need"]


def generator(seed, *path):
    return random.Random("/".join(map(str, (seed,) + path)))
