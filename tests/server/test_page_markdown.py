"""Markdown on the chat page: what each construct becomes, hostile texts, linear time, and growing equals whole."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pageuser import PageUser

pytestmark = [pytest.mark.page]

SHOW = """
const { MarkdownView } = await import("/static/markup.js");
const show = (pieces) => {
  const root = document.createElement("div");
  const view = new MarkdownView(root);
  let text = "";
  for (const piece of pieces) { text += piece; view.update(text); }
  view.update(text, true);
  root.querySelectorAll("figcaption button").forEach((button) => button.remove());
  return root;
};
"""
CASES = {
    "": "",
    "one\ntwo": "<p>one<br>two</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "# A *b*\ntext": "<h3>A <em>b</em></h3><p>text</p>",
    "###### deep #": "<h6>deep</h6>",
    "#no heading": "<p>#no heading</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "**b** *i* ***both*** ~~gone~~ __b__ _i_": (
        "<p><strong>b</strong> <em>i</em> <em><strong>both</strong></em> <del>gone</del> "
        "<strong>b</strong> <em>i</em></p>"
    ),
    "2 * 3 * 4 and snake_case_name": "<p>2 * 3 * 4 and snake_case_name</p>",
    "\\*not\\* `a*b*` `` a`b ``": "<p>*not* <code>a*b*</code> <code>a`b</code></p>",
    "**open and [x] and `tick": "<p>**open and [x] and `tick</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "1. a\n\n   more\n\n2. b": "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>",
    "1. a\n  - inner\n2. b": "<ol><li>a<ul><li>inner</li></ul></li><li>b</li></ol>",
    "text\n- item": "<p>text</p><ul><li>item</li></ul>",
    "- [x] done\n- [ ] open": (
        '<ul><li class="task"><input type="checkbox" disabled="" aria-label="Task"> done</li>'
        '<li class="task"><input type="checkbox" disabled="" aria-label="Task"> open</li></ul>'
    ),
    "> q\n> > r": "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>",
    "|a|b|\n|:-|-:|\n|1 \\| 2|`x`|\nafter": (
        '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table><thead><tr><th class="left">a</th>'
        '<th class="right">b</th></tr></thead><tbody><tr><td class="left">1 | 2</td>'
        '<td class="right"><code>x</code></td></tr></tbody></table></div><p>after</p>'
    ),
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "```py\nif a < b:\n\tpass\n```\nend": (
        '<figure class="code"><figcaption><span>py</span></figcaption><pre tabindex="0" aria-label="Code, py">'
        "<code>if a &lt; b:\n\tpass</code></pre></figure><p>end</p>"
    ),
    "~~~\nopen": (
        '<figure class="code"><figcaption><span>text</span></figcaption><pre tabindex="0" aria-label="Code">'
        "<code>open</code></pre></figure>"
    ),
    "[text](https://a.example/x_(y))": (
        '<p><span class="link">text <span class="address">(https://a.example/x_(y))</span></span></p>'
    ),
    '![cat](http://a.example/cat.png "Cat")': (
        '<p><span class="link">cat <span class="address">(picture: http://a.example/cat.png)</span></span></p>'
    ),
    "[https://a.example](https://a.example)": '<p><span class="link">https://a.example</span></p>',
    "[x](javascript:alert(1))": '<p><span class="link">x <span class="address">(javascript:alert(1))</span></span></p>',
    "<b>x</b> &amp; <script>alert(1)</script>": (
        "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp; &lt;script&gt;alert(1)&lt;/script&gt;</p>"
    ),
    "é ñ 日本 **ü** 😀": "<p>é ñ 日本 <strong>ü</strong> 😀</p>",
    "line\r\nend\r\n": "<p>line<br>end</p>",
}


def test_what_each_construct_becomes(user: PageUser) -> None:
    texts = list(CASES)
    shown = user.run(SHOW + "return values[0].map((text) => show([text]).innerHTML);", texts)
    assert dict(zip(texts, shown, strict=True)) == CASES


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "</div><script src=//evil.example/x.js></script>",
    "[a](javascript:alert(1)) [b](data:text/html,x) ![c](//evil.example/x.png)",
    '[x](y" onmouseover="alert(1))',
    "![" * 50 + "x" + "](http://evil.example/)" * 50,
    "```<script>\n</code></pre><script>alert(1)</script>\n```",
    "|<img src=x>|\n|-|\n|<iframe src=http://evil.example>|",
    "# <style>*{display:none}</style>",
    "- <a href=javascript:alert(1)>x</a>",
    "\u202eright to left\u202c \x00 \x1b[31m \ufffe",
)


def test_hostile_texts_stay_texts(user: PageUser) -> None:
    script = """
    window.alert = () => { window.broken = true; };
    return values[0].map((text) => {
      const root = show([text]);
      document.body.append(root);
      const nodes = [...root.querySelectorAll("*")];
      root.remove();
      const names = [...new Set(nodes.map((node) => node.localName))];
      const attributes = [...new Set(nodes.flatMap((node) => [...node.attributes].map(({ name }) => name)))];
      return { names, attributes };
    });
    """
    found = user.run(SHOW + script, HOSTILE)
    names = {name for each in found for name in each["names"]}
    attributes = {name for each in found for name in each["attributes"]}
    made = "p br h3 ul ol li em strong code span div table thead tbody tr th td figure figcaption pre"
    assert names <= set(made.split())
    assert attributes <= {"class", "tabindex", "role", "aria-label"}
    assert user.run("return window.broken ?? false") is False
    loaded = user.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(user.address) for name in loaded)


HUGE = {
    "stars": "*a ",
    "mixed marks": "_a **b *c ",
    "closers": "a* b_ c** ",
    "brackets": "[",
    "pictures": "![",
    "unfinished links": "[a](",
    "titles": '[a](b "',
    "closing brackets": "]",
    "quotes": ">",
    "quoted lines": "> > > a\n",
    "bullets": "- ",
    "list": "- a\n",
    "list with gaps": "- a\n\n",
    "table rows": "|a|b|\n",
    "table columns": "|-",
    "fences": "```\n",
    "backslashes": "\\",
    "spaces": " ",
    "empty lines": "\n",
    "hashes": "#",
    "bold words": "**a** ",
    "paragraphs": "word\n\n",
    "numbers": "1. a\n2. b\n",
    "entities": "&lt;",
}


def test_the_work_grows_in_proportion_to_the_text(user: PageUser) -> None:
    """Counted, not timed: every character that is looked at through a string method or a regular expression."""
    script = """
    const { parse, inline } = await import("/static/markdown.js");
    let work = 0;
    const count = (owner, name, size) => {
      const original = owner[name];
      owner[name] = function (...given) {
        const made = original.apply(this, given);
        work += size(this, given, made);
        return made;
      };
      return () => { owner[name] = original; };
    };
    const result = (_, __, made) => 1 + (typeof made === "string" ? made.length : 0);
    const undo = [
      ...["slice", "trim", "trimStart", "replaceAll"].map((name) => count(String.prototype, name, result)),
      count(String.prototype, "includes", (text) => text.length),
      count(RegExp.prototype, "exec", (_, [text], made) => 1 + (made ? made[0].length : 0)),
      count(Array.prototype, "push", (_, given) => given.length),
      count(Array.prototype, "splice", (list, _, made) => list.length + made.length),
    ];
    const walk = (blocks) => {
      for (const block of blocks) {
        if (block.text !== undefined && block.type !== "code") inline(block.text);
        walk(block.blocks ?? []);
        (block.items ?? []).forEach((item) => walk(item.blocks));
        [block.head ?? [], ...(block.rows ?? [])].forEach((row) => row.forEach((cell) => inline(cell)));
      }
    };
    const made = {};
    for (const [name, piece] of Object.entries(values[0])) {
      const costs = [5000, 20000].map((size) => {
        const text = piece.repeat(Math.ceil(size / piece.length));
        work = 0;
        walk(parse(text).blocks);
        return work;
      });
      made[name] = costs[1] / Math.max(costs[0], 1);
    }
    undo.forEach((back) => back());
    return made;
    """
    growth = user.run(script, HUGE)
    assert growth.keys() == HUGE.keys()
    assert {name: round(each, 1) for name, each in growth.items() if each > 6} == {}  # 4 times the text


def test_deep_nesting_does_not_break_the_page(user: PageUser) -> None:
    deep = [
        ">" * 30000,
        "*a _b " * 5000 + "c_ d* " * 5000,
        "- " * 20000,
        "\n".join("  " * n + "- x" for n in range(300)),
    ]
    depths = user.run(
        SHOW
        + """
    return values[0].map((text) => {
      const root = show([text]);
      document.body.append(root);
      root.getBoundingClientRect();
      let deepest = 0;
      for (const node of root.querySelectorAll("*")) {
        let depth = 0;
        for (let up = node; up !== root; up = up.parentElement) depth += 1;
        deepest = Math.max(deepest, depth);
      }
      root.remove();
      return deepest;
    });
    """,
        deep,
    )
    assert all(depth < 60 for depth in depths)


PARTS = st.sampled_from(
    [
        *(
            "word",
            " ",
            "\n",
            "\n\n",
            "*",
            "**",
            "_",
            "`",
            "```",
            "~~~\n",
            "- ",
            "1. ",
            "  ",
            "    ",
            "> ",
            "# ",
            "|",
            "|-|-|",
        ),
        *("---", "[", "](", ")", "!", "\\", "\r\n", "\t", "a|b\n", "2) ", "<b>", "~~", "é", "😀"),
    ]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.lists(PARTS, max_size=40), min_size=8, max_size=8))
def test_a_text_that_grows_is_shown_as_one_that_came_whole(user: PageUser, texts: list[list[str]]) -> None:
    script = """
    return values[0].filter((pieces) => {
      const whole = show([pieces.join("")]).innerHTML;
      const grown = show(pieces).innerHTML;
      const letters = show([...pieces.join("")]).innerHTML;
      return whole !== grown || whole !== letters;
    });
    """
    assert user.run(SHOW + script, texts) == []


def test_settled_blocks_keep_their_elements(user: PageUser) -> None:
    script = """
    const root = document.createElement("div");
    const settled = [];
    const view = new (await import("/static/markup.js")).MarkdownView(root, (each) => settled.push(each.textContent));
    view.update("one\\n\\ntwo\\nlines\\n");
    const first = root.firstChild;
    view.update("one\\n\\ntwo\\nlines\\n\\nthree\\n\\nfour");
    const kept = root.firstChild === first;
    const early = [...settled];
    view.update("one\\n\\ntwo\\nlines\\n\\nthree\\n\\nfour", true);
    return { kept, early, settled, shown: root.childElementCount };
    """
    found = user.run(script)
    assert found["kept"]
    assert found["early"] == ["one", "twolines"]
    assert found["settled"] == ["one", "twolines", "three", "four"]
    assert found["shown"] == 4
