"""Each chapter's five questions, and the teachers' page that is collected from them."""

import re
from collections import Counter

import collect_quizzes
import pytest
from collect_quizzes import CHAPTERS, HEADING, PAGE, prose, questions

every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


@every_chapter
def test_five_questions_with_one_right_answer_each(chapter):
    found = questions(prose(chapter))
    assert len(found) == 5
    for question in found:
        assert question.words.endswith("?")
        assert [option.right for option in question.options].count(True) == 1
        assert 3 <= len(question.options) <= 4
        assert len({option.words for option in question.options}) == len(question.options)


@every_chapter
def test_every_option_has_feedback_of_one_short_sentence(chapter):
    for question in questions(prose(chapter)):
        for option in question.options:
            assert option.why.endswith(".") and option.why.count(". ") == 0, option
            assert 4 <= len(option.why.split()) <= 25 and len(option.words.split()) <= 25, option


@every_chapter
def test_nothing_in_the_quiz_needs_a_script_or_math(chapter):
    """Raw HTML is not typeset: a dollar sign would be shown as one."""
    (quiz,) = [cell for cell in prose(chapter) if cell.startswith(HEADING)]
    assert set(re.findall(r"</?(\w+)", quiz)) <= {"details", "summary", "b", "em", "code"}
    assert "$" not in quiz and "{term}" not in quiz


def test_the_right_answer_cannot_be_guessed_from_its_place_or_length():
    every = [question for chapter in CHAPTERS for question in questions(prose(chapter))]
    places = Counter([option.right for option in question.options].index(True) for question in every)
    assert set(places) >= {0, 1, 2} and max(places.values()) <= len(every) / 2
    longest = [max(question.options, key=lambda option: len(option.words)).right for question in every]
    assert sum(longest) <= len(every) / 2


@pytest.mark.parametrize("wrong", ["**2.** Why?", '<details class="option"><summary>a</summary>no verdict</details>'])
def test_a_line_of_another_form_is_shown(wrong):
    good = '<details class="option"><summary>a</summary><b>Right.</b> b</details>'
    blocks = [wrong, good] if wrong.startswith("**") else ["**1.** Why?", wrong]
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        questions(["\n\n".join([HEADING, "Decide.", *blocks])])


def test_the_teachers_page_is_what_the_chapters_say():
    text = PAGE.read_text(encoding="utf-8")
    assert collect_quizzes.page(text) == text, "run `make quizzes`"


def test_a_page_without_its_marks_is_an_error():
    with pytest.raises(ValueError, match="once each"):
        collect_quizzes.page("# For teachers\n")


def test_the_teachers_page_sorts_every_exercise_once():
    cells = "\n".join(cell for chapter in CHAPTERS for cell in prose(chapter))
    labels = re.findall(r"\{exercise-start\}\n:label: (ex-[\w-]+)", cells)
    assert sorted(re.findall(r"<(ex-[\w-]+)>`", PAGE.read_text(encoding="utf-8"))) == sorted(labels)


def test_the_teachers_page_names_sections_that_exist():
    titles = {chapter.name.split("_")[0].lstrip("0"): "\n".join(prose(chapter)) for chapter in CHAPTERS}
    named = re.findall(r'chapter (\d+),[^|"]*"([^"]+)"', PAGE.read_text(encoding="utf-8"))
    assert len(named) >= 3
    assert [pair for pair in named if f"## {pair[1]}\n" not in titles[pair[0]]] == []


@every_chapter
def test_the_check_has_a_solution_behind_a_click(chapter):
    """On the page, where nothing runs, the solution is one click away."""
    opened = '<details class="answer"><summary>'
    assert sum(cell.startswith(f"{opened}Solution</summary>\n\n") for cell in prose(chapter)) == 1
    assert "\n".join(prose(chapter)).count("<details") == "\n".join(prose(chapter)).count("</details>")
