"""The page as its reader meets it, in a real browser, against a server that says what the test wants."""

from __future__ import annotations

import base64
import io
import itertools
import re
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("selenium", reason="selenium is missing: pip install '.[browser]'")

from chrome import PATIENCE, png
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from stub import ANSWER, ERRORS, OTHER, text_of, tree_of

PASSES = ANSWER[1:]  # the first is the prefill's
SCHEMES = ("light", "dark")
PHONE = (360, 740)


def images_of(body) -> list[Image.Image]:
    parts = [part for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) for part in parts]


def step_to(page, number: int) -> None:
    page.js("const [n, s] = [arguments[0], document.getElementById('step')]; s.value = n;"
            "s.dispatchEvent(new Event('input'))", number)  # fmt: skip


def reopened(page, script, **facts: object) -> None:
    """Another model behind the same page."""
    script.model = {**script.model, "speculens": {**script.model["speculens"], **facts}}
    page.driver.refresh()
    page.meet()


@pytest.fixture
def answered(page):
    page.ask()
    page.answered()
    return page


# --- the answer


def test_the_answer_is_the_text_that_the_server_sent(answered, script):
    assert answered.find(".answer").get_property("textContent") == text_of(ANSWER)
    (body,) = script.asked
    assert body["messages"] == [{"role": "user", "content": "What does the chart show?"}]
    assert body["speculens"] == {"steps": True, "baseline": False}
    assert (body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) == (0, 1, 0, 256)
    assert body["stream"] and body["model"] == "testbed-llava"


def test_runs_are_marked_by_how_much_one_pass_accepted(answered):
    marked = answered.all(".answer .kept")
    assert [run.get_property("textContent") for run in marked] == ["".join(kept).lstrip() for kept, _ in ANSWER if kept]
    sizes = {1: "1", 2: "2", 3: "2", 4: "3", 5: "3"}
    assert [run.get_attribute("data-size") for run in marked] == [
        sizes.get(len(kept), "4") for kept, _ in ANSWER if kept
    ]
    underlines = [int(run.value_of_css_property("border-bottom-width").removesuffix("px")) for run in marked]
    assert underlines == [int(run.get_attribute("data-size")) for run in marked]  # not by colour alone


def test_an_answer_does_not_begin_with_a_gap(page, script):
    script.passes = [([], " Two"), ([" more", " bars"], " rise.")]
    page.ask()
    page.answered()
    assert page.find(".answer").get_property("textContent") == "Two more bars rise."


@pytest.mark.parametrize(("sized", "told"), [(False, "tree of 24 nodes"), (True, "trees of up to 24 nodes")])
def test_the_head_tells_how_large_trees_are(page, script, sized, told):
    reopened(page, script, sized=sized)
    assert told in page.text("#model")


def test_the_text_comes_piece_by_piece_and_is_spoken_in_sentences(page, script):
    script.pace = 0.3
    page.ask()
    page.wait(lambda: 0 < len(page.text(".answer")) < len(text_of(ANSWER).strip()))
    assert page.shows("#stop") and not page.shows("#send")
    page.answered()
    said = page.texts("#spoken p")
    assert "".join(said) == text_of(ANSWER)
    assert 1 < len(said) < len(ANSWER)
    assert page.find("#spoken").get_attribute("aria-live") == "polite"


def test_figures_are_the_servers(answered):
    kept = sum(len(kept) for kept, _ in PASSES) / len(PASSES)
    assert answered.text("#accepted") == f"{kept:.2f}"
    assert answered.text("#length") == f"{kept + 1:.2f}"
    rate, tokens, passes, seconds = answered.texts("#with td")
    assert (int(tokens), int(passes)) == (sum(len(kept) + 1 for kept, _ in ANSWER), len(PASSES))
    assert float(rate) == pytest.approx(int(tokens) / float(seconds.split()[0]), rel=0.1)
    assert f"acceptance length {kept + 1:.2f} ({kept:.2f} without the bonus token)" in answered.text(".closing")


def test_a_conversation_goes_on_and_begins_anew(answered, script):
    answered.ask("And where?")
    answered.answered()
    assert script.asked[1]["messages"] == [
        {"role": "user", "content": "What does the chart show?"},
        {"role": "assistant", "content": text_of(ANSWER)},
        {"role": "user", "content": "And where?"},
    ]
    answered.find("#clear").click()
    assert not answered.all("#turns li") and not answered.shows("#insight") and not answered.shows("#clear")
    answered.ask("Anew?")
    answered.answered()
    assert len(script.asked[2]["messages"]) == 1


def test_settings_go_along_and_wrong_ones_do_not(page, script):
    page.find("summary").click()
    for name, value in {"temperature": "0.7", "top-p": "0.9", "seed": "17", "max-tokens": "0"}.items():
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(value)
    page.ask()
    assert page.text("#error").startswith("Most tokens: ")
    page.find("#max-tokens").clear()
    page.find("#send").click()
    page.answered()
    (body,) = script.asked
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.7, 0.9, 17)
    assert "max_tokens" not in body  # empty: as much as there is room for


# --- the tree


@pytest.mark.parametrize("number", [1, 5, 8])
def test_the_tree_of_each_step_can_be_walked_back_to(answered, number):
    step_to(answered, number)
    kept, own = PASSES[number - 1]
    tree = tree_of(ANSWER[number - 1][1], kept)
    assert len(answered.all("#tree .node:not(.own)")) == len(tree["tokens"])
    assert len(answered.all("#tree path")) == len(tree["tokens"])  # an edge to each but the root, and to the own
    assert answered.texts("#tree .kept text") == [token.replace(" ", "␣") for token in kept]
    assert answered.texts("#tree .own text") == [own.replace(" ", "␣").replace("\n", "⏎")]
    said = f"Step {number} of {len(PASSES)}: {len(tree['tokens']) - 1} drafted, {len(kept)} accepted"
    assert answered.text("#caption").startswith(said)
    assert said in answered.find("#tree").get_attribute("aria-label")
    assert said in answered.find("#step").get_attribute("aria-valuetext")
    (words,) = answered.all(".answer .here")
    assert words.get_property("textContent") == "".join((*kept, own)).lstrip()


def test_a_space_alone_is_shown_where_tokens_are_told(page, script):
    script.passes = [((), "Age"), ((" ",), "7")]
    page.ask()
    page.answered()
    assert page.text("#caption").endswith("1 accepted “␣”.")


def test_the_last_step_is_shown_first_and_the_slider_has_as_many_as_there_are(answered):
    assert answered.find("#step").get_attribute("max") == answered.find("#step").get_property("value")
    assert answered.text("#caption").startswith(f"Step {len(PASSES)} of {len(PASSES)}: ")
    assert len(answered.all("#strip rect")) == len(PASSES)
    assert not answered.all("#tree .own")  # what came after the last path is told by no later root


def test_nodes_of_the_tree_do_not_cover_each_other_and_the_path_is_straight(answered):
    step_to(answered, 5)
    places = [node.rect for node in answered.all("#tree .node rect")]
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]
        )  # fmt: skip
        assert apart
    assert len({node.rect["y"] for node in answered.all("#tree .kept rect, #tree .root rect")}) == 1


def test_the_tree_fits_the_width_where_wanted(answered):
    step_to(answered, 5)
    assert answered.js("const s = document.getElementById('scroll'); return s.scrollWidth > s.clientWidth")
    answered.find("#fit").click()
    assert answered.js("const s = document.getElementById('scroll'); return s.scrollWidth <= s.clientWidth")


# --- with and without drafter


def test_the_baseline_is_run_and_equal(page, script):
    page.find("#compare").click()
    page.ask()
    page.answered()
    assert [body["speculens"]["baseline"] for body in script.asked] == [False, True]
    first, second = ({**body, "speculens": None} for body in script.asked)
    assert first == second
    rates = [float(page.texts(f"{row} td")[0]) for row in ("#with", "#without")]
    times = float(re.match(r"([\d.]+)×", page.text("#verdict"))[1])
    assert times == pytest.approx(rates[0] / rates[1], rel=0.02)
    assert "The two texts are equal" in page.text("#verdict")
    assert page.find(".answer").get_property("textContent") == text_of(ANSWER)


def test_the_steps_can_be_walked_while_the_baseline_still_runs(page, script):
    script.pace = 0.1
    page.find("#compare").click()
    page.ask()
    page.wait(lambda: page.texts("#without td")[1] > "0")
    step_to(page, 2)
    assert page.find("#step").is_enabled() and page.shows("#stop")
    assert page.text("#caption").startswith("Step 2 of ")
    page.find("#stop").click()
    page.answered()
    assert page.text("#verdict") == "The run without drafter did not end: nothing to compare."
    assert page.find(".answer").get_property("textContent") == text_of(ANSWER)


def test_where_texts_part_is_shown(page, script):
    script.other = OTHER
    page.find("#compare").click()
    page.ask()
    page.answered()
    assert "part after" in page.text("#verdict")
    assert "with drafter “each other.”, without “one another.”" in page.text("#verdict")


def test_without_a_baseline_there_is_no_switch(page, script):
    reopened(page, script, baseline=False)
    assert not page.shows("#compare")


# --- pictures


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_pictures_are_handed_over_and_go_as_they_are(page, script, event):
    files = [("a.png", png(60, 40, "teal")), ("b.png", png(30, 50, "plum"))]
    page.hand_over(event, *files)
    page.wait(lambda: len(page.all("#pictures img")) == 2)
    assert [image.get_attribute("alt") for image in page.all("#pictures img")] == ["a.png", "b.png"]
    assert not page.shows("#drop")
    page.ask()
    page.answered()
    (body,) = script.asked
    uris = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert [base64.b64decode(uri.partition(",")[2]) for uri in uris] == [data for _, data in files]
    assert body["messages"][0]["content"][-1] == {"type": "text", "text": "What does the chart show?"}
    assert not page.all("#pictures li") and len(page.all(".pictures img")) == 2


def test_a_picture_is_chosen_and_removed(page, tmp_path):
    (tmp_path / "chart.png").write_bytes(png())
    page.find("#choose").send_keys(str(tmp_path / "chart.png"))
    page.wait(lambda: page.all("#pictures li"))
    (remove,) = page.all("#pictures button")
    assert remove.accessible_name == "Remove chart.png"
    remove.click()
    assert not page.all("#pictures li")


@pytest.mark.parametrize("what", ["pixels", "bytes"])
def test_what_the_server_would_refuse_is_made_smaller_and_said(page, script, what):
    if what == "pixels":
        file = png(2000, 1000)
    else:
        buffer = io.BytesIO()
        Image.effect_noise((990, 990), 90).convert("RGB").save(buffer, "png")
        file = buffer.getvalue()
        assert len(file) > 1_000_000
        reopened(page, script, limits={"image_bytes": 300_000})
    page.hand_over("drop", ("large.png", file))
    page.wait(lambda: page.all("#pictures li"))
    page.wait(lambda: "large.png was made smaller, from" in page.text("#note"))
    page.ask()
    page.answered()
    (sent,) = images_of(script.asked[0])
    if what == "pixels":
        assert sent.size == (1414, 707)
    else:
        assert len(script.asked[0]["messages"][0]["content"][0]["image_url"]["url"]) <= 300_000 * 4 / 3 + 100


def test_what_is_no_picture_and_what_is_too_much_is_refused(page):
    page.hand_over("drop", ("notes.png", b"no picture"))
    page.wait(lambda: page.text("#error"))
    assert page.text("#error") == "notes.png cannot be read as a picture."
    page.hand_over("drop", *[(f"{number}.png", png()) for number in range(4)])
    page.wait(lambda: len(page.all("#pictures li")) == 3)
    page.wait(lambda: page.text("#error") == "This server takes at most 3 pictures in a conversation.")


# --- what goes wrong


def test_stop_ends_the_request_and_keeps_what_was_said(page, script):
    script.pace = 0.5
    page.ask()
    page.wait(lambda: len(page.all(".answer .kept")) >= 2)
    page.find("#stop").click()
    page.answered()
    assert script.left.wait(PATIENCE)
    said = page.find(".answer").get_property("textContent")
    assert said and said != text_of(ANSWER) and text_of(ANSWER).startswith(said)
    assert page.text(".closing").endswith("stopped")
    assert not page.text("#error")
    script.pace = 0
    page.ask("Go on.")
    page.answered()
    assert script.asked[1]["messages"][1] == {"role": "assistant", "content": said}


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(400, ERRORS[400]), (429, f"{ERRORS[429]} Try again in 7 s."), (500, ERRORS[500])],
)
def test_an_error_is_said_and_the_question_can_be_asked_again(page, script, status, sentence):
    script.status = status
    page.hand_over("drop", ("a.png", png()))
    page.wait(lambda: page.all("#pictures li"))
    page.ask()
    page.wait(lambda: page.text("#error"))
    assert page.text("#error") == sentence
    assert page.find("#error").get_attribute("role") == "alert"
    page.answered()
    assert page.find("#question").get_property("value") == "What does the chart show?"
    assert len(page.all("#pictures li")) == 1 and not page.all("#turns li")
    script.status = 200
    page.find("#send").click()
    page.answered()
    assert not page.text("#error") and len(page.all("#turns li")) == 1


def test_after_an_error_the_last_answer_can_still_be_walked_through(answered, script):
    script.status = 429
    answered.ask("Once more?")
    answered.wait(lambda: answered.text("#error"))
    answered.answered()
    step_to(answered, 5)
    assert answered.text("#caption").startswith(f"Step 5 of {len(PASSES)}: ")
    assert answered.all(".answer .here")


def test_a_server_that_comes_later_is_met_with_the_first_question(page, script):
    script.key = "not yet"
    page.driver.refresh()
    page.wait(lambda: page.shows("#door"))
    script.key = ""
    page.ask()
    page.wait(lambda: page.text(".answer"))
    page.answered()
    assert "testbed" in page.text("#model")
    assert not page.shows("#door")


@pytest.mark.parametrize("way", ["cut", "fail"])
def test_an_answer_that_breaks_off_is_kept_and_told(page, script, way):
    setattr(script, way, 4)
    page.ask()
    page.wait(lambda: page.text("#error"))
    sentence = {"cut": "The connection ended before the answer did.", "fail": ERRORS[500]}[way]
    assert page.text("#error") == sentence
    page.answered()
    assert page.find(".answer").get_property("textContent") == text_of(ANSWER[:4])
    assert page.text(".closing").endswith("broken off")


def test_a_server_that_is_gone_is_told(page):
    page.js("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.ask()
    page.wait(lambda: page.text("#error"))
    assert page.text("#error") == "The server cannot be reached."


def test_the_key_is_asked_for_and_kept_in_memory_only(page, script):
    script.key = "open sesame"
    page.driver.refresh()
    page.wait(lambda: page.shows("#door"))
    assert page.driver.switch_to.active_element == page.find("#key")
    page.find("#key").send_keys("wrong", Keys.ENTER)
    page.wait(lambda: page.text("#error") == ERRORS[401])
    assert page.shows("#door")
    page.find("#key").send_keys("open sesame", Keys.ENTER)
    page.meet()
    assert not page.shows("#door") and not page.text("#error")
    page.ask()
    page.answered()
    assert page.text(".answer")
    assert page.js("return [localStorage.length, sessionStorage.length, document.cookie, location.search]") == [
        0,
        0,
        "",
        "",
    ]
    assert "sesame" not in page.js("return document.documentElement.outerHTML")


def test_a_question_waits_for_the_key(page, script):
    script.key = "open sesame"
    page.ask()
    page.wait(lambda: page.shows("#door"))
    page.find("#key").send_keys("open sesame", Keys.ENTER)
    page.wait(lambda: page.text(".answer"))
    page.answered()
    assert [body["messages"][0]["content"] for body in script.asked] == ["What does the chart show?"] * 2


# --- for everybody


def test_everything_works_by_keyboard(page, script):
    def press(*keys: str):
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused():
        return page.driver.switch_to.active_element.get_attribute("id")

    order = []
    for _ in range(5):
        press(Keys.TAB)
        order.append(focused())
    assert order[:4] == ["question", "choose", "compare", "send"]
    page.find("#question").send_keys("One line", Keys.SHIFT + Keys.ENTER)
    page.find("#question").send_keys("and another", Keys.ENTER)
    page.answered()
    assert script.asked[0]["messages"][0]["content"] == "One line\nand another"
    assert focused() == "question"
    page.find("#step").send_keys(Keys.HOME)
    assert page.text("#caption").startswith("Step 1 of ")
    page.find("#step").send_keys(Keys.ARROW_RIGHT)
    assert page.text("#caption").startswith("Step 2 of ")
    press(Keys.TAB)
    assert focused() == "scroll"
    script.pace = 0.5
    page.find("#question").send_keys("Again")
    press(*[Keys.TAB] * 4)
    page.wait(lambda: focused() == "send")
    press(Keys.ENTER)
    page.wait(lambda: focused() == "stop" and page.all("#turns li:last-child .kept"))
    press(Keys.ENTER)
    assert script.left.wait(PATIENCE)
    page.wait(lambda: focused() == "send")


def test_every_control_has_a_name_and_headings_are_in_order(answered):
    answered.find("summary").click()
    answered.hand_over("drop", ("a.png", png()))
    answered.wait(lambda: answered.all("#pictures li"))
    tree = answered.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    shown = [node for node in tree if not node["ignored"]]
    named = {
        "button",
        "textbox",
        "checkbox",
        "switch",
        "slider",
        "spinbutton",
        "image",
        "img",
        "region",
        "form",
        "list",
    }
    nameless = [
        node for node in shown
        if node["role"]["value"] in named - {"list"} and not node.get("name", {}).get("value")
    ]  # fmt: skip
    assert not nameless
    assert {"textbox", "switch", "slider", "spinbutton", "button"} <= {node["role"]["value"] for node in shown}
    levels = [int(heading.tag_name[1]) for heading in answered.all("h1, h2, h3, h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert answered.find("html").get_attribute("lang") == "en"
    identities = answered.js("return [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(identities) == len(set(identities))


CONTRASTS = """
const light = (colour) => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const worst = {};
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || element.tagName === "title" || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const drawn = element.tagName === "text";
  const inks = [drawn ? style.fill : style.color];
  const under = drawn ? getComputedStyle(element.previousElementSibling).fill : ground(element);
  const [dark, bright] = [light(inks[0]), light(under)].sort((a, b) => a - b);
  const name = `${element.tagName} ${element.className.baseVal ?? element.className} ${element.id}`;
  worst[name] = (bright + 0.05) / (dark + 0.05);
}
return worst;
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast(answered, script, scheme):
    answered.media(prefers_color_scheme=scheme)
    step_to(answered, 5)
    answered.find("summary").click()
    script.status = 429
    answered.ask("Again?")
    answered.wait(lambda: answered.text("#error"))
    answered.answered()
    answered.js("document.getElementById('insight').hidden = document.getElementById('door').hidden = false")
    contrasts = answered.js(CONTRASTS)
    assert len(contrasts) > 20
    assert not {name: ratio for name, ratio in contrasts.items() if ratio < 4.5}


def test_the_dark_scheme_is_dark(page):
    grounds = []
    for scheme in SCHEMES:
        page.media(prefers_color_scheme=scheme)
        grounds.append(
            sum(map(int, re.findall(r"\d+", page.find("body").value_of_css_property("background-color"))[:3]))
        )
    assert grounds[0] > 700
    assert grounds[1] < 100


def test_those_who_want_calm_see_nothing_blink(page, script):
    script.pace = 0.5
    page.ask()
    blinking = "return getComputedStyle(document.querySelector('.running'), '::after').animationName"
    page.wait(lambda: page.all(".running"))
    assert page.js(blinking) == "blink"
    page.media(prefers_reduced_motion="reduce")
    assert page.js(blinking) == "none"
    page.find("#stop").click()
    page.answered()


def test_a_phone_shows_all_without_scrolling_sideways(page, script):
    page.size(*PHONE, touch=True)
    script.other = OTHER
    page.hand_over("drop", ("a.png", png(900, 300)), ("b.png", png(300, 900)))
    page.wait(lambda: len(page.all("#pictures li")) == 2)
    page.find("summary").click()
    page.find("#compare").click()
    page.ask("Whatisthislongwordthatdoesnotbreakanywhereandgoesonandonandon? " * 2)
    page.answered()
    page.js("document.getElementById('door').hidden = false")
    step_to(page, 5)
    assert page.js("return document.documentElement.scrollWidth") == PHONE[0]
    outside = """return [...document.querySelectorAll("body *")].filter((element) =>
        !element.closest("#scroll, .hidden") && element.getBoundingClientRect().right > innerWidth + 0.5
    ).map((element) => element.outerHTML)"""
    assert page.js(outside) == []


# --- for the one who runs it


def test_nothing_is_fetched_from_elsewhere_and_the_console_is_silent(page, stub):
    page.hand_over("drop", ("a.png", png(2000, 1000)))
    page.wait(lambda: page.all("#pictures li"))
    page.find("#compare").click()
    page.ask("<img src=x onerror=alert(1)>")
    page.answered()
    step_to(page, 3)
    own = urlsplit(stub.url).netloc
    places = {urlsplit(address).netloc for address in page.requests() if not address.startswith(("data:", "blob:"))}
    assert places == {own}
    assert page.complaints() == []
    assert page.text(".question") == "<img src=x onerror=alert(1)>"
    assert not page.all(".question img")
