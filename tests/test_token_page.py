"""tokens.html, opened in a browser: what it shows of a samples.jsonl that was written by hand."""

import base64
import gzip
import html.parser
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl, run, write_jsonl

from configurator import UserError
from lib import report, token_page
from lib.answers import Answer
from lib.problems import Problem
from lib.rollouts import Group, PromptStream
from lib.samples import first_wrong_line, rows_for_log, token_texts
from lib.step_rewards import tokens_of_line

# ----------------------------------------------------------------------------------------------
# a browser

# Runs in a copy of the page when all is shown. done() writes what it is given into the page.
SCRIPT = """
<script>
function done(found) {
  const element = document.createElement("pre");
  element.id = "found";
  element.textContent = JSON.stringify(found);
  document.body.append(element);
}
function key(name) {
  const event = new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true });
  document.activeElement.dispatchEvent(event);
}
function whenReady() {
  if (document.body.dataset.ready !== "yes") return setTimeout(whenReady, 10);
  %s
}
whenReady();
</script>
</body>
"""


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium; with PRIME_SHARED there has to be one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    if "PRIME_SHARED" in os.environ:
        pytest.fail("no chromium: apt-get install chromium")
    pytest.skip("no chromium")


@pytest.fixture
def browse(chromium, tmp_path):
    """A function that opens a page and returns its elements, as a browser has made them."""

    def open_page(path, script="done(null);"):
        copy = tmp_path / "copy.html"
        copy.write_text(path.read_text("utf-8").replace("</body>", SCRIPT % script), "utf-8")
        options = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
            --disable-background-networking --disable-component-update --disable-sync
            --virtual-time-budget=20000 --dump-dom"""
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        command = [chromium, *options.split(), f"--user-data-dir={profile}"]
        # A browser asks for updates, for one; no address is found.
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return Elements(done.stdout)

    return open_page


class Element:
    """A part of a page: tag, attributes, and its content: elements and texts."""

    def __init__(self, tag, attributes):
        self.tag = tag
        self.attributes = dict(attributes)
        self.content = []

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    def all(self, tag_or_class):
        """The elements inside with this tag or class, in order."""
        found = []
        for part in self.content:
            if isinstance(part, str):
                continue
            if part.tag == tag_or_class or tag_or_class in part.classes:
                found.append(part)
            found += part.all(tag_or_class)
        return found

    def with_id(self, name):
        (found,) = [part for part in self.all_elements() if part.attributes.get("id") == name]
        return found

    def all_elements(self):
        for part in self.content:
            if not isinstance(part, str):
                yield part
                yield from part.all_elements()


class Elements(html.parser.HTMLParser, Element):
    """A page. found: what its script has left for us."""

    EMPTY = {"meta", "input", "link", "br", "hr", "img"}

    def __init__(self, text):
        html.parser.HTMLParser.__init__(self)
        Element.__init__(self, "page", [])
        self.open = [self]
        self.feed(text)
        self.found = json.loads(self.with_id("found").text)

    def handle_starttag(self, tag, attributes):
        element = Element(tag, attributes)
        self.open[-1].content.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].content.append(data)


# ----------------------------------------------------------------------------------------------
# a worked example


def sample(step, problem, texts, outcome, rewards, **more):
    """A row of samples.jsonl. The reference gives each token -2; returns and advantages differ."""
    tokens = len(texts)
    row = dict(
        step=step,
        problem=problem,
        ground_truth="63",
        response="".join(texts[:-1]),
        outcome=outcome,
        finish_reason="stop",
        tokens=list(range(tokens)),
        token_texts=texts,
        prm_logprobs=[reward - 2 for reward in rewards],
        ref_logprobs=[-2.0] * tokens,
        process_rewards=rewards,
        returns=[sum(rewards[i:]) for i in range(tokens)],
        advantages=[0.125 * i for i in range(tokens)],
    )
    return row | more


WRONG = ["7", "+", "6", "=", "12", "\n", "4", "+1", "\n", "\\boxed{52}", "<end>"]
RIGHT = ["7", "+", "6", "=", "13", "\n", "4", "+2", "\n", "\\boxed{63}", "<end>"]
NASTY = ["</script><script>done(1)</script>", "\"'&amp;<b>", "\x07\t", "\ud83d", "\u202e", "", "é"]


@pytest.fixture
def samples(tmp_path):
    """Two answers to 17+46? in step 0, two in step 5, and one to another prompt."""
    against = [0, 0, 0, 0, -0.5, 0, 0, 0, 0, 0.01, 0]
    for_it = [0, 0, 0, 0, 0.3, 0, 0, -0.0071, 0, 0, 0]
    more = dict(finish_reason="length", mask=[1, 1, 0, 1, 1, 1, 1])
    rows = [
        sample(0, "17+46?", WRONG, 0.0, against, first_wrong=0),
        sample(0, "17+46?", RIGHT, 1.0, for_it, first_wrong=None),
        sample(3, "<img src=x onerror=done(2)>", NASTY, 0.25, [0.1] * 7, **more),
        sample(5, "17+46?", [*RIGHT[:6], "<end>"], 0.0, [0.0] * 7, first_wrong=1),
        sample(5, "17+46?", RIGHT, 1.0, for_it, first_wrong=None),
    ]
    return write_jsonl(tmp_path / "samples.jsonl", rows)


@pytest.fixture
def page(samples):
    report.main([str(samples)])
    return samples.with_name("tokens.html")


def test_answers_by_prompt_the_right_ones_first(browse, page):
    shown = browse(page)
    sum_prompt, other = shown.all("prompt")
    assert sum_prompt.all("h2")[0].text == "17+46?"
    assert "right answer: 63" in sum_prompt.text

    right, wrong = sum_prompt.all("answer")
    assert "right" in right.all("h3")[0].text
    assert "wrong" in wrong.all("h3")[0].text
    assert right.all("tokens")[0].text == "7+6=13↵\n4+2↵\n\\boxed{63}<end>"
    assert [token.text for token in right.all("token")] == [
        text.replace("\n", "↵") for text in RIGHT
    ]
    assert "outcome 0.25" in other.text
    assert "cut at the limit" in other.text


def test_rewards_have_colour_and_strong_ones_a_mark(browse, page):
    """The prompt's largest is 0.5: 0.3 is strong as well, 0.0071 is not."""
    right, wrong = browse(page).all("prompt")[0].all("answer")
    up, down = right.all("token")[4], wrong.all("token")[4]
    assert {"up", "strong"} <= set(up.classes)
    assert {"down", "strong"} <= set(down.classes)
    assert (up.attributes["data-reward"], down.attributes["data-reward"]) == ("+0.3", "−0.5")

    weak = right.all("token")[7]
    assert "down" in weak.classes and "strong" not in weak.classes
    without = right.all("token")[0]
    assert not {"up", "down", "strong"} & set(without.classes)
    # Full colour; the square root of 3/5.
    assert "--strength: 1.000" in down.attributes["style"]
    assert "--strength: 0.775" in up.attributes["style"]


def test_the_first_wrong_step_is_marked(browse, page):
    right, wrong = browse(page).all("prompt")[0].all("answer")
    assert not right.all("wrong-mark")
    assert "first wrong step" in wrong.text
    assert [token.text for token in wrong.all("wrong-step")] == ["7", "+", "6", "=", "12", "↵"]
    marks = [part for part in wrong.all("tokens")[0].content if not isinstance(part, str)]
    assert "wrong-mark" in marks[0].classes


def test_how_often_the_lowest_reward_finds_the_wrong_step(page):
    """-0.5 is among 6 of 11 tokens; the other wrong answer has no reward, and a step of 1 of 7."""
    assert data_of(page)["notes"] == [
        "In 1 of 2 wrong answers the lowest reward is on the first wrong step; "
        "a token drawn at random would be there in 0.7."
    ]


def test_the_numbers_of_a_token_by_keyboard(browse, page):
    """Tab goes to the first token of an answer; the panel has the numbers of the one in focus."""
    steps = """
      const stops = document.querySelectorAll('.token[tabindex="0"]');
      const panel = () => document.getElementById("detail").innerText;
      const found = [stops.length, panel()];
      stops[1].focus();
      for (let i = 0; i < 4; i++) key("ArrowRight");
      found.push(panel());
      key("ArrowDown");
      found.push(panel());
      key("End");
      key("ArrowRight");
      found.push(panel());
      key("Home");
      found.push(panel());
      found.push(document.querySelectorAll('.token[tabindex="0"]').length);
      done(found);
    """
    stops, at_first, fifth, next_line, last, first, stops_then = browse(page, steps).found
    assert stops == stops_then == 3
    assert "Tab" in at_first

    lines = fifth.split("\n")
    assert lines[:2] == ["token 5 of 11", "“12”"]
    numbers = dict(zip(lines[2::2], lines[3::2]))
    assert numbers == {
        "process reward": "−0.5",
        "PRM log-probability": "−2.5",
        "reference log-probability": "−2",
        "return": "−0.49",
        "advantage": "+0.5",
    }
    assert next_line.startswith("token 7 of 11\n“4”")
    assert last.startswith("token 11 of 11\n“<end>”")
    assert first.startswith("token 1 of 11")


def test_the_numbers_of_a_token_by_mouse(browse, page):
    steps = """
      const token = document.querySelectorAll(".answer")[1].querySelectorAll(".token")[9];
      token.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
      done(document.getElementById("detail").innerText);
    """
    shown = browse(page, steps).found
    assert "\\boxed{52}" in shown
    assert "process reward\n+0.01" in shown


def test_a_prompt_over_the_steps(browse, page):
    """People count steps from 1: they are 1, 4 and 6."""
    steps = """
      const texts = () => [...document.querySelectorAll(".prompt")].filter((p) => !p.hidden)
        .map((p) => p.textContent);
      const found = [];
      const buttons = document.querySelectorAll(".prompt button");
      found.push([...buttons].map((button) => button.textContent));
      buttons[1].click();
      found.push(texts()[0]);
      const select = document.getElementById("step");
      found.push([...select.options].map((option) => option.textContent));
      document.getElementById("later").click();
      found.push(texts());
      document.getElementById("later").click();
      found.push(texts());
      done(found);
    """
    buttons, sixth, choices, first_only, fourth_only = browse(page, steps).found
    assert buttons == ["1", "6"]
    assert "7+6=13↵\n✗ first wrong step<end>" in sixth
    assert choices == ["all", "1", "4", "6"]
    assert len(first_only) == len(fourth_only) == 1
    assert "✗ first wrong step7+6=12↵\n" in first_only[0]
    assert "outcome 0.25" in fourth_only[0]


def test_what_models_write_is_only_text(browse, page):
    """Neither a script nor an element comes of it, and what is invisible has a form."""
    shown = browse(page)
    assert shown.found is None
    assert not shown.all("img")
    assert not shown.all("b")
    answer = shown.all("prompt")[1].all("answer")[0]
    assert [token.text for token in answer.all("token")] == [
        "</script><script>done(1)</script>",
        "\"'&amp;<b>",
        "\\u0007⇥\t",
        "\\ud83d",
        "\\u202e",
        "▫",
        "é",
    ]
    # What a tool wrote looks different.
    by_tool = [token.text for token in answer.all("token") if "tool" in token.classes]
    assert by_tool == ["\\u0007⇥\t"]
    source = page.read_text("utf-8")
    assert source.count("</script>") == 2
    assert "onerror" not in source


def test_nothing_comes_from_elsewhere(browse, page):
    """The page loads nothing, and the browser is told to load nothing whatever comes into it."""
    steps = """
      const loaded = performance.getEntriesByType("resource").length;
      const forbidden = (event) => done([loaded, event.blockedURI]);
      document.addEventListener("securitypolicyviolation", forbidden);
      const image = document.createElement("img");
      image.src = "http://127.0.0.1:9/image.png";
      document.body.append(image);
    """
    assert browse(page, steps).found == [0, "http://127.0.0.1:9/image.png"]
    assert not re.search(r"https?:", page.read_text("utf-8"))


@pytest.mark.parametrize("numbers_below", ["false", "true"])
def test_no_scrolling_sideways_at_400_pixels(browse, samples, numbers_below, tmp_path):
    """The page in a frame, since a browser's window cannot be made so narrow."""
    rows = read_jsonl(samples)
    rows.append(sample(6, "x" * 300, ["y" * 300, " and", "\n\nz"] * 20, 1.0, [0.3] * 60))
    report.main([str(write_jsonl(samples, rows))])
    steps = f"""
      document.getElementById("numbers").checked = {numbers_below};
      document.getElementById("numbers").dispatchEvent(new Event("change"));
      document.querySelector(".token").focus();
      const root = document.documentElement;
      parent.postMessage([innerWidth, root.scrollWidth, root.scrollHeight], "*");
    """
    source = samples.with_name("tokens.html").read_text("utf-8")
    inside = tmp_path / "inside.html"
    inside.write_text(source.replace("</body>", SCRIPT % steps), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body data-ready="yes"><iframe src="{inside.as_uri()}" width="400" height="800" '
        'style="border: 0"></iframe></body>'
    )
    inner, width, height = browse(frame, "onmessage = (event) => done(event.data);").found
    assert inner == 400
    assert width <= 400
    assert height > 1000


# ----------------------------------------------------------------------------------------------
# sizes, and files of all kinds


def data_of(page):
    """What a page was told."""
    (packed,) = re.findall(r'id="data">([^<]*)<', page.read_text("utf-8"))
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def long_rows(count, tokens):
    """Answers as long as they get, of 8 per step, with numbers such as a run has."""
    rng = random.Random(0)
    words = [f" {rng.getrandbits(20):x}"[: rng.randint(1, 7)] for _ in range(5000)]
    rows = []
    for number in range(count):
        texts = rng.choices(words, k=tokens)
        rewards = [float(f"{rng.gauss(0, 0.01) * rng.random() ** 4:.3g}") for _ in texts]
        row = sample(number // 8, f"problem {number // 4}", texts, float(number % 2), rewards)
        reference = [float(f"{-(rng.expovariate(1) ** 3):.3g}") for _ in texts]
        row["ref_logprobs"] = reference
        row["prm_logprobs"] = [float(f"{a + 9 * b:.3g}") for a, b in zip(reference, rewards)]
        row["advantages"] = [float(f"{1 - 3 * value:.3g}") for value in row["returns"]]
        row["returns"] = [float(f"{value:.3g}") for value in row["returns"]]
        rows.append(row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("count, tokens", [(64, 3000), (128, 3000)])
def test_a_page_of_long_answers_stays_small(tmp_path, count, tokens):
    path = write_jsonl(tmp_path / "samples.jsonl", long_rows(count, tokens))
    page = tmp_path / "tokens.html"
    token_page.write_token_page(str(path), str(page))
    assert page.stat().st_size < 2_000_000

    data = data_of(page)
    answers = [a for p in data["prompts"] for step in p["steps"] for a in step["answers"]]
    assert len(answers) == count
    for answer in answers:
        assert answer["tokens"] == tokens
        assert len(answer["texts"]) == tokens - answer["left_out"]
    # Of half as many answers as a page may have, nothing is left out.
    left_out = {answer["left_out"] > 0 for answer in answers}
    assert left_out == {count > 64}
    assert (len(data["notes"]) == 1) == (count > 64)


def test_the_middle_of_a_long_answer_is_left_out(samples):
    """Of 11 tokens 5 are shown: 3 of the beginning, 2 of the end."""
    row = read_jsonl(samples)[0]
    data = token_page.answer_data(row, 5)
    assert data["texts"] == ["7", "+", "6", "\\boxed{52}", "<end>"]
    assert (data["gap"], data["left_out"], data["tokens"]) == (3, 6, 11)
    assert data["numbers"]["process_rewards"] == dict(decimals=5, values=[0, 0, 0, 1000, 0])
    assert data["sum"] == pytest.approx(-0.49)


def test_a_gap_is_shown_where_it_is(browse, samples, monkeypatch):
    monkeypatch.setattr(token_page, "MAX_BYTES", 0)
    report.main([str(samples)])
    steps = """
      document.querySelector(".token").focus();
      key("ArrowRight");
      key("ArrowRight");
      done(document.getElementById("detail").innerText);
    """
    shown = browse(samples.with_name("tokens.html"), steps)
    answers = shown.all("answer")
    assert "7 tokens are left out" in answers[0].text
    # It begins at the last of seven tokens, which is shown.
    assert "first wrong step: token" not in answers[2].text
    assert "without their middle" in shown.with_id("notes").text
    assert shown.found.startswith("token 10 of 11")


def test_steps_of_a_long_run(tmp_path):
    """Of 100 steps of 8 answers 16 are shown, whole, among them the first and the last."""
    rows = []
    for step in range(100):
        for number in range(8):
            rows.append(sample(step, f"{step} {number % 2}", ["1", "<end>"], 1.0, [0.1, 0.2]))
    path = write_jsonl(tmp_path / "samples.jsonl", rows)
    token_page.write_token_page(str(path), str(tmp_path / "tokens.html"))
    data = data_of(tmp_path / "tokens.html")
    assert data["notes"] == ["128 of 800 answers are shown, of 16 of 100 steps."]
    steps = [step["step"] for prompt in data["prompts"] for step in prompt["steps"]]
    assert {1, 100} <= set(steps)
    assert len(set(steps)) == 16
    for prompt in data["prompts"]:
        assert [len(step["answers"]) for step in prompt["steps"]] == [4]


def test_a_file_of_an_earlier_version(browse, tmp_path):
    """Ids instead of texts; neither log-probabilities nor returns."""
    row = dict(step=0, problem="1?", ground_truth="2", response="ab", outcome=0.0)
    row |= dict(finish_reason="stop", tokens=[41, 7], process_rewards=[0.5, 0.0])
    row["advantages"] = [0.1, 0.2]
    path = write_jsonl(tmp_path / "samples.jsonl", [row])
    report.main([str(path)])
    steps = """
      document.querySelector(".token").focus();
      done(document.getElementById("detail").innerText);
    """
    shown = browse(tmp_path / "tokens.html", steps)
    assert [token.text for token in shown.all("token")] == ["[41]", "[7]"]
    expected = "token 1 of 2\n“[41]”\nprocess reward\n+0.5\nadvantage\n+0.1"
    assert shown.found == expected
    assert "these are their ids" in shown.with_id("notes").text


def test_a_run_of_outcomes_alone(browse, samples):
    """Without process rewards no token has a colour, and the panel has what there is."""
    rows = read_jsonl(samples)
    for row in rows:
        for name in ("process_rewards", "prm_logprobs", "ref_logprobs"):
            del row[name]
    report.main([str(write_jsonl(samples, rows))])
    steps = """
      document.querySelector(".token").focus();
      done(document.getElementById("detail").innerText);
    """
    shown = browse(samples.with_name("tokens.html"), steps)
    assert shown.found == "token 1 of 11\n“7”\nreturn\n+0.293\nadvantage\n0"
    assert shown.with_id("notes").text == "This run had no process rewards."
    assert shown.all("up") == shown.all("down") == []


def test_lines_that_are_no_answers_are_counted(samples):
    with open(samples, "a") as file:
        file.write('{"step": 1}\n[]\nnull\n{"step": 2, "tok')
    report.main([str(samples)])
    data = data_of(samples.with_name("tokens.html"))
    assert data["notes"][0] == "4 lines of the file are no answers with tokens and outcomes."


def test_files_without_answers_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        report.main([str(tmp_path / "missing.jsonl")])
    empty = write_jsonl(tmp_path / "empty.jsonl", [dict(problem="1?", response="2")])
    with pytest.raises(UserError, match="has no answers with tokens"):
        report.main([str(empty)])


@pytest.mark.slow
def test_the_command(samples):
    """It works where the repository is, and a mistake is one line."""
    done = run("-m", "lib.report", samples)
    assert done.stdout == f"wrote {samples.with_name('tokens.html')}\n"
    command = [sys.executable, "-m", "lib.report", f"{samples}.gz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------
# rows of samples.jsonl


def test_first_wrong_line_is_the_arithmetic_worlds():
    """Against the world's own judge of lines, for right answers and many damaged ones."""
    prepare = importlib.import_module("data.arithmetic.prepare")
    rng = random.Random(0)
    wrong = 0
    for _ in range(500):
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        *steps, box = prepare.solution(a, b).split("\n")
        lines = [*steps, box]
        change = rng.choice(["none", "line", "missing", "extra"])
        where = rng.randrange(len(lines))
        if change == "line":
            lines[where] = lines[where][::-1]
        elif change == "missing":
            del lines[where]
        elif change == "extra":
            lines.insert(where, "1+1+0=02")
        response = "\n".join(lines)
        outcome = float(box in lines)
        expected = prepare.first_error(f"{a}+{b}?", response)
        if outcome == 1 and lines[:3] == steps:
            # A right answer with a line between the steps and the box: no step of it is wrong.
            expected = None
        assert first_wrong_line(response, steps, outcome) == expected, response
        wrong += expected is not None
    assert 200 < wrong < 400


@pytest.mark.parametrize(
    "response, index",
    [
        ("12 + 10 = 22\n3 * 22 = 66\n\\boxed{66}", None),
        ("10 + 12 = 22\n22 * 3 = 66\n\\boxed{66}", None),
        ("12 + 10 = 23\n3 * 23 = 69\n\\boxed{69}", 0),
        ("12 + 10 = 22\n3 * 22 = 65\n\\boxed{65}", 1),
        ("12 + 10 = 22\n3 * 22 = 66\n\\boxed{65}", 2),
        ("12 + 10 = 22", 1),
        ("", 0),
    ],
)
def test_first_wrong_line_is_the_word_problems(response, index):
    """By hand, and by the world's own judge."""
    prepare = importlib.import_module("data.words.prepare")
    row = dict(ground_truth="66", steps=["12 + 10 = 22", "22 * 3 = 66"])
    assert prepare.first_error(row, response) == index
    outcome = float("\\boxed{66}" in response)
    assert first_wrong_line(response, row["steps"], outcome) == index


def test_empty_lines_at_the_start_count():
    assert first_wrong_line("\n\n1 + 2 = 3\n4\n", ["1 + 2 = 3"], 0.0) == 3
    texts = ["\n\n", "1 +", " 2 = 3\n", "4", "\n", "<end>"]
    lines = [list(tokens_of_line(texts, line)) for line in range(6)]
    assert lines == [[0], [1], [1, 2], [3, 4], [5], [5]]


def test_rows_are_all_answers_of_a_prompt(world):
    """Three rows are wanted: one prompt has four. The numbers are those of its answers."""
    import torch

    from lib.pretrained import load_tokenizer

    tokenizer = load_tokenizer(f"{world}/init")
    problems = []
    for number in range(5):
        row = dict(steps=["1+1+0=02"]) if number % 2 else dict(steps=7)
        problems.append(Problem(number, f"{number}?", [], "math", "2", row))
    groups = []
    for number in range(5):
        answers = []
        for k in range(4):
            text = f"1+1+0=0{k}"
            tokens = tokenizer.encode(text)
            answers.append(Answer(tokens, [0.0] * len(tokens), "stop", text=text))
        groups.append(Group(number, [1], answers))
    width = len(groups[0].answers[0].tokens)
    values = torch.arange(20.0)[:, None] + torch.arange(width) / 8 + 0.01
    stream = PromptStream(problems, tokenizer, 10, seed=0)

    rows = rows_for_log(2, groups, stream, dict(returns=values), limit=3)
    assert len(rows) == 4
    (chosen,) = {row["problem"] for row in rows}
    first = 4 * int(chosen[0])
    for k, row in enumerate(rows):
        assert row["step"] == 2
        assert "".join(row["token_texts"]) == row["response"]
        assert row["returns"] == [float(f"{first + k + i / 8 + 0.01:.3g}") for i in range(width)]
        assert "mask" not in row

    # The same prompt comes first whatever the order of the groups.
    again = rows_for_log(2, groups[::-1], stream, dict(returns=values), limit=3)
    assert {row["problem"] for row in again} == {chosen}
    # The others have a column `steps` that is no list of lines.
    everything = rows_for_log(2, groups, stream, {}, limit=20)
    wrong = [row["first_wrong"] for row in everything if row["problem"] in ("1?", "3?")]
    assert wrong == [0, 0, 1, 0] * 2
    assert sum("first_wrong" in row for row in everything) == 8
    assert rows_for_log(2, groups, stream, {}, limit=0) == []


def test_texts_of_tokens(world):
    """A character of several tokens belongs to the last, and nothing is lost."""
    from lib.pretrained import load_tokenizer

    tokenizer = load_tokenizer(f"{world}/init")
    text = "aé😀 \\boxed{7}\n"
    tokens = tokenizer.encode(text)
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert texts[:7] == ["a", "", "é", "", "", "", "😀"]
    assert "".join(texts) == text

    # Cut in the middle of a character, and bytes that are none.
    assert token_texts(tokenizer, tokens[:5])[-1] == "\ufffd"
    broken = [*tokens[3:5], *tokens[3:5], *tokens[:1]]
    assert len(token_texts(tokenizer, broken)) == 5
    assert "".join(token_texts(tokenizer, broken)) == tokenizer.decode(broken)
