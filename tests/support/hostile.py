"""Texts of tokens that would act on a page, a terminal or their neighbours if they were taken for more than text."""

HOSTILE = (
    "</script><script>document.title = 'hit'</script>",
    "<img src=x onerror=\"document.title = 'hit'\">",
    "<!--<script>",
    "&lt;b&gt;",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b2J\x00\x08\x7f",
    "tab\tand\r\nlines\u2028\u2029\x0b",
    "\u202eright to left\u202c\u2066\u200f",
    "שלום",
    "مرحبا",
    "日本語",
    "👩\u200d👧",
    "e\u0301\u0327",
    "\ufeff\u200b\u00ad",
    "`${document.title}`",
    "__proto__",
    "\\u003c/script\\u003e",
    "x" * 300,
)
