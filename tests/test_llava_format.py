"""LLaVA's format: what real models write, there and back without a lost word; what LLaVA publishes can be read."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmfl_lite.stages.llava_format import check_llava, to_llava
from mllmfl_lite.stages.records import Record
from mllmfl_lite.teachers.prompts import KINDS, load_prompts


def record(text, kind="conversation", name="1"):
    return Record(name, f"{name}.png", kind, text, True, "m", "p", "")


def values(text, **more):
    """The turns after ``<image>``."""
    (entry,) = to_llava([record(text)], {"conversation": "Ask."}, **more)
    assert check_llava([entry], ["1.png"]) == []
    return [
        entry["conversations"][0]["value"].removeprefix("<image>\n"),
        *(t["value"] for t in entry["conversations"][1:]),
    ]


FOUR = ["What is it?", "A cat.", "What colour?", "Grey, as in Vitamin A: no."]
FORMS = {
    "plain": "Question: {}\nAnswer: {}\nQuestion: {}\nAnswer: {}",
    "numbers": "Question 1: {}\nAnswer 1: {}\n\nQuestion 2: {}\nAnswer 2: {}",
    "a list": "1. Question: {}\n   Answer: {}\n2. Question: {}\n   Answer: {}",
    "bold": "**Question:** {}\n**Answer:** {}\n\n**Question:** {}\n**Answer:** {}",
    "all bold": "**Question 1: {}**\n**Answer: {}**\n\n**Question 2: {}**\n**Answer: {}**",
    "letters": "Q: {}\nA: {}\n\nQ: {}\nA: {}",
    "letters with numbers": "Q1. {}\nA1. {}\nQ2. {}\nA2. {}",
    "user and assistant": "User: {}\nAssistant: {}\nUser: {}\nAssistant: {}",
    "human and AI": "### Human: {}\n### AI: {}\n### Human: {}\n### AI: {}",
    "bullets": "- Q: {}\n- A: {}\n• Q: {}\n• A: {}",
    "one line": "Question: {} Answer: {} Question: {} Answer: {}",
    "Windows": "Question: {}\r\nAnswer: {}\r\n\r\nQuestion: {}\r\nAnswer: {}\r\n",
    "lower case": "question: {}\nanswer: {}\nquestion: {}\nanswer: {}",
    "labels alone": "Question\n{}\nAnswer\n{}\nQuestion\n{}\nAnswer\n{}",
    "LLaVA's own": "Question:\n{}\n===\nAnswer:\n{}\n===\nQuestion:\n{}\n===\nAnswer:\n{}",
    "no blank": "Question:{}\nAnswer:{}\nQuestion:{}\nAnswer:{}",
    "mixed": "Q: {}\nAnswer: {}\nQ: {}\nAnswer: {}",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_becomes_turns(form):
    assert values(FORMS[form].format(*FOUR)) == FOUR


@pytest.mark.parametrize(("text", "expected"), [
    ("Sure! Here it is:\n\nQuestion: Who?\nAnswer: Me.", ["Ask.", "Sure! Here it is:", "Who?", "Me."]),
    ("Question: Who?\nAnswer: Me.\nQuestion: What colour", ["Who?", "Me.\nQuestion: What colour"]),
    ("Question: Who?\nQuestion: Why?\nAnswer: Me.", ["Who?\nQuestion: Why?", "Me."]),
    ("Question: Who?\nAnswer:", ["Ask.", "Question: Who?\nAnswer:"]),
    ("Question:\nAnswer: A cat.", ["Ask.", "Question:\nAnswer: A cat."]),
    ("Q: Who?\nA: The user: me.\nQ: Why?\nA: Plan A. No.", ["Who?", "The user: me.", "Why?", "Plan A. No."]),
    ("Question: Which?\nA. A cat\nB. A dog\nAnswer: A", ["Which?\nA. A cat\nB. A dog", "A"]),
    ("Q: Which?\nA: A **grey** one.", ["Which?", "A **grey** one."]),
    ("Question What is it?\nAnswer A cat.", ["Ask.", "Question What is it?\nAnswer A cat."]),
    ("1. What is it?\n   A cat.", ["Ask.", "1. What is it?\n   A cat."]),
    ("问题：这是什么？\n回答：一只狗。", ["Ask.", "问题：这是什么？\n回答：一只狗。"]), ("A cat.", ["Ask.", "A cat."]),
])  # fmt: skip
def test_what_cannot_be_split_stays_where_it_is(text, expected):
    assert values(text) == expected


def words(text):
    return re.findall(r"\w+", text)


LABELS = re.compile(
    r"\b(?:(?:question|answer|user|human|assistant|gpt|bot|ai)(?: ?\d)?|[qa]\d?)\b|^ *\d\.", re.I | re.M
)


@pytest.mark.parametrize("start", ["", "Sure! Here is a conversation:\n\n"])
@pytest.mark.parametrize("end", ["", "\nQuestion: And what", "\n\nI hope this helps!"])
@pytest.mark.parametrize("form", FORMS)
def test_no_word_is_lost_there_and_back(start, form, end):
    text = start + FORMS[form].format(*FOUR) + end
    (entry,) = json.loads(json.dumps(to_llava([record(text)], {"conversation": "Ask."})))
    back = (
        " ".join(turn["value"] for turn in entry["conversations"]).replace("<image>\nAsk.", "").replace("<image>", "")
    )
    assert words(LABELS.sub(" ", back)) == words(LABELS.sub(" ", text))


def test_plain_exports_one_answer_an_image():
    assert values(FORMS["plain"].format(*FOUR), plain=True) == ["Ask.", FORMS["plain"].format(*FOUR)]


def test_a_text_answers_its_prompt():
    (entry,) = to_llava([record("It is a cat.", "detailed_description")])
    question = "<image>\n" + load_prompts()["detailed_description"]
    assert entry["conversations"] == [{"from": "human", "value": question}, {"from": "gpt", "value": "It is a cat."}]
    assert entry["id"] == "1-detailed_description" and entry["image"] == "1.png"


@given(st.text(max_size=200), st.sampled_from(KINDS))
def test_whatever_a_model_says_the_export_keeps_llavas_rules(text, kind):
    entries = to_llava(
        [record(text, kind), record(text + "<im<image>age>", kind, "2"), record(f"Q: {text}\nA: {text}")]
    )
    assert check_llava(entries, ["1.png", "2.png"]) == []


@given(
    st.lists(st.sampled_from(["Question:", "Answer:", "Q:", "A:", "\n", "cat", "User:", "**", "1. ", "- ", "AI", "?"]))
)
def test_labels_in_any_order_lose_no_word(parts):
    text = " ".join(parts)
    kept = " ".join(values(text))
    assert kept.count("cat") == text.count("cat")


@pytest.mark.parametrize("text", [
    " " * 1_000_000 + "x", "- " * 500_000, "*" * 1_000_000, "Question: " * 100_000, "Q: a A: b " * 50_000,
    "1. " * 300_000,
    "\n" * 1_000_000, "user" * 250_000, "Q: a\n" + "---\n" * 250_000 + "A: b\n", "\n \t" * 300_000, "A: *" * 200_000,
    ("-" + " " * 300_000) * 3 + "x", "Question" + " " * 999_999, "<im" * 300_000, "<image>" * 140_000,
    "Question: a" + "\n" * 2400,
])  # fmt: skip
def test_a_megabyte_takes_no_time(text):
    start = time.process_time()
    values(text)
    assert time.process_time() - start < 10


# --------------------------------------------------------------------------------------------------------- checks


def turns(*pairs):
    return [{"from": who, "value": value} for who, value in pairs]


GOOD = {"id": "a", "image": "a.png", "conversations": turns(("human", "<image>\nWhat?"), ("gpt", "A cat."))}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (GOOD | {"image": "b.png"}, "image 'b.png' does not exist"),
        (GOOD | {"image": ["a.png", "b.png"]}, "must be one file name"),
        (GOOD | {"conversations": turns(("human", "What?"), ("gpt", "A cat."))}, "<image> must stand once"),
        (GOOD | {"conversations": turns(("human", "<image> <image>"), ("gpt", "A cat."))}, "<image> must stand once"),
        (GOOD | {"conversations": turns(("human", "Hm"), ("gpt", "<image>"))}, "in the first human turn"),
        (GOOD | {"conversations": turns(("gpt", "<image>"), ("human", "A cat."))}, "turns must alternate"),
        (GOOD | {"conversations": turns(("human", "<image>"))}, "turns must alternate"),
        (GOOD | {"conversations": turns(("system", "<image>"))}, "turns must alternate"),
        (GOOD | {"conversations": []}, "has no list of conversations"),
        (GOOD | {"conversations": {"from": "human"}}, "has no list of conversations"),
        (GOOD | {"conversations": [{"from": "human"}]}, "has no list of conversations"),
        (GOOD | {"conversations": [{"from": "human", "value": None}]}, "has no list of conversations"),
        ("rubbish", "has no list of conversations"),
    ],
)
def test_each_broken_rule_is_named(entry, problem):
    (found,) = check_llava([GOOD, entry], ["a.png"])
    assert problem in found and found.startswith("entry 1")


def test_entries_of_llavas_published_files_pass():
    """Ids that repeat, numeric ids and names, ``<image>`` at the end or inside, a system turn, fields of their own."""
    end = GOOD | {"id": 33471, "image": 33471, "conversations": turns(("human", "What?\n<image>"), ("gpt", "A cat."))}
    inside = GOOD | {"conversations": turns(("human", "Is <image> a cat?"), ("gpt", "Yes.")), "extra": [1]}
    system = GOOD | {"conversations": turns(("system", "Be kind."), ("human", "<image>\nWhat?"), ("gpt", "A cat."))}
    assert check_llava([GOOD, GOOD, end, inside, system]) == []
