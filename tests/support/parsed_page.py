"""A page as an HTML parser sees it."""

import html.parser


class ParsedPage(html.parser.HTMLParser):
    """Every tag that is opened is closed, nothing is fetched; collects what tests look at.

    Attributes:
        identifiers, links: values of "id", and of "href" and "src".
        cells: texts of the tables' cells.
        entries: texts of the contents.
        open_rows: rows of every table that a reader sees without opening anything.
    """

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.entries: list[str] = []
        self.open_rows: list[int] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe")
        self.identifiers += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "xlink:href", "src") if name in attributes]
        self.cells += [""] if tag in ("td", "th") else []
        self.entries += [""] if tag == "li" and "nav" in self.open else []
        if tag == "tbody":
            self.open_rows.append(0)
        if tag == "tr" and "tbody" in self.open and "details" not in self.open:
            self.open_rows[-1] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if "li" in self.open and "nav" in self.open:
            self.entries[-1] += data
