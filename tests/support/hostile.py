"""Texts of tokens that would act on a page, a terminal or their neighbours if they were taken for more than text."""

HEBREW = "\u05e9\u05dc\u05d5\u05dd"
ARABIC = "\u0645\u0631\u062d\u0628\u0627"
HOSTILE = (
    "</script><script>document.title = 'hit'</script>",
    "<img src=x onerror=\"document.title = 'hit'\">",
    "<!--<script>",
    "&lt;b&gt;",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b2J\x00\x08\x7f",
    "tab\tand\r\nlines\u2028\u2029\x0b",
    "\u202eright to left\u202c\u2066\u200f",
    HEBREW,
    ARABIC,
    "日本語",
    "👩\u200d👧",
    "e\u0301\u0327",
    "\ufeff\u200b\u00ad",
    "`${document.title}`",
    "__proto__",
    "\\u003c/script\\u003e",
    "x" * 300,
)
