"""How Sphinx makes the site. What the project is called, and where it lives, stands in settings.ini."""
import ast
import inspect
import re
from configparser import ConfigParser
from dataclasses import fields, is_dataclass
from importlib import import_module
from io import StringIO
from operator import attrgetter
from pathlib import Path
from textwrap import dedent
from tokenize import COMMENT, generate_tokens

import jieba
from sphinx.search.zh import SearchChinese

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent.parent/"settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
PACKAGE, SOURCE = settings["lib_name"], f"{settings['git_url']}/blob/{settings['branch']}"
LIMITED = re.compile(r"~?(?:typing\.)?Annotated\[(\w+), '([^']+)', <.*?>\]")

project = html_title = settings["title"]
author, copyright, release = settings["author"], settings["copyright"], settings["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "sphinx.ext.githubpages"]
nb_execution_mode, nb_merge_streams = "off", True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_html_meta = dict(
    description=settings["description"], author=author, keywords=settings["keywords"].replace(" ", ", "))
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
html_theme = "furo"
html_theme_options = dict(
    source_view_link=f"{SOURCE}/{settings['nbs_path']}/{{filename}}",
    footer_icons=[{"name": "Source", "url": settings["git_url"], "html": "Source", "class": ""}],
    dark_css_variables={"mystnb-source-border-color": "var(--color-background-border)"},
)
html_baseurl = settings["doc_host"] + settings["doc_baseurl"]
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = False
html_search_language = "zh"  # English words, and Chinese ones
# Its stemmer; Sphinx 9.0 asks the browser for a Chinese one (sphinx-doc/sphinx#14229)
SearchChinese.language_name = "English"
jieba.setLogLevel("WARNING")


def linkcode_resolve(domain: str, info: dict[str, str]) -> str:
    "Where a symbol stands in the repository."
    obj = attrgetter(info["fullname"])(import_module(info["module"]))
    lines, start = inspect.getsourcelines(getattr(obj, "fget", obj))
    return f"{SOURCE}/{info['module'].replace('.', '/')}.py#L{start}-L{start + len(lines) - 1}"


def docments(obj) -> list[str]: # A function, or a class with fields
    "Comments of parameters and result, as fields; that of several is a note, as it does not say whose it is."
    source = dedent(inspect.getsource(obj))
    node, = ast.parse(source).body
    said = {t.start[0]: t.string[1:].strip() for t in generate_tokens(StringIO(source).readline) if t.type == COMMENT}
    if isinstance(node, ast.ClassDef):
        names = [(n.lineno, f"param {n.target.id}") for n in node.body if isinstance(n, ast.AnnAssign)]
    else:
        args = [a for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.arg != "self"]
        names = [(a.lineno, f"param {a.arg}") for a in args]
        if node.returns: names.append((node.returns.lineno, "returns"))
    lines = [line for line, _ in names]
    found = [f":{name if lines.count(line) == 1 else 'note'}: {said[line]}" for line, name in names if line in said]
    return list(dict.fromkeys(found))


def settings_of(obj) -> list[str]: # A dataclass
    "The help text and the limit of each setting of its own; the page of settings has the inherited ones."
    own = [f for f in fields(obj) if f.name in obj.__annotations__ and "help" in f.metadata]
    limits = {f.name: f"; {m[2]}" for f in own if (m := LIMITED.search(str(f.type)))}
    return [f":param {f.name}: {f.metadata['help']}{limits.get(f.name, '')}" for f in own]


def add_docments(app, what, name, obj, options, lines: list[str]):
    "Bases and comments, below the docstring."
    if what in ("class", "exception"):
        bases = [f":py:obj:`~{b.__module__}.{b.__qualname__}`" for b in obj.__bases__ if b not in (object, tuple)]
        if bases: lines += ["Bases: " + ", ".join(bases), ""]
        if not is_dataclass(obj) and not hasattr(obj, "_fields"): obj = obj.__init__
    elif what not in ("function", "method"): return
    if not getattr(obj, "__module__", "").startswith(PACKAGE): return
    lines += docments(obj)
    if is_dataclass(obj): lines += settings_of(obj)


def escape_underscores(app, what, name, obj, options, lines: list[str]):
    "A word that ends with one, like eval_, is no reference."
    lines[:] = [re.sub(r"(?<=\w)_(?!\w)", r"\_", line) for line in lines]


def plain_types(app, what, name, obj, options, signature: str | None, returns: str | None):
    "A setting's type without its limit, which comes below."
    return LIMITED.sub(r"\1", signature or "") or signature, returns


def skip_foreign(app, what, name, obj, skip, options) -> bool | None:
    "Leave out what another package put into a class, and a named tuple's fields: they are below its docstring."
    foreign = not getattr(obj, "__module__", PACKAGE).startswith(PACKAGE)
    return True if foreign or type(obj).__name__ == "_tuplegetter" else None


def no_source(app, page: str, template, context: dict, doctree):
    "The link of an API page would lead to a file that is not in the repository; each of its symbols has one."
    if page.startswith("api/"): context["page_source_suffix"] = ""


def setup(app):
    app.connect("autodoc-process-docstring", add_docments)
    app.connect("autodoc-process-docstring", escape_underscores)
    app.connect("autodoc-process-signature", plain_types)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("html-page-context", no_source)
