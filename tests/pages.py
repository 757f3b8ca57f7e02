"""A reader of written pages."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The links, the pictures and the table cells of a well-formed page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
            assert dict(attrs)["alt"]
        elif tag == "a":
            self.links.append(dict(attrs)["href"])
        if tag not in {"meta", "img"}:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in {"th", "td"}:
            self.cells.append(data)
