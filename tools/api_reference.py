"""The API reference, made from the docstrings: ``python -m tools.api_reference`` writes ``build/api_reference``.

Sphinx imports every public module of miepo and renders its docstrings (Google style) as HTML, a page for each package.
Every warning is an error: a module that cannot be imported, markup that does not parse, a reference to a name that
miepo does not have. Needs ``pip install -c tools/constraints.txt -e ".[docs]"``.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import miepo

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "miepo"
OUT = ROOT / "build" / "api_reference"
LEFT_OUT = ("miepo.__main__", "miepo.renamed")  # the command's entry, and old names
UNLINKED = [
    r"(?!miepo\b).*",  # names of other libraries, whose references are not at hand
    r"miepo\..*\.(T|Row|_\w+)",  # type variables, and bases that are not public
]

SETTINGS: dict[str, Any] = {
    "project": "miepo",
    "author": "The miepo developers",
    "copyright": "The miepo developers",
    "version": miepo.__version__,
    "release": miepo.__version__,
    "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"],
    "html_theme": "alabaster",
    "html_show_sourcelink": False,
    "napoleon_numpy_docstring": False,
    "autodoc_member_order": "bysource",
    "autodoc_typehints": "signature",
    "autodoc_inherit_docstrings": False,  # Lightning's, with references into its own pages
    "autodoc_type_aliases": {"Policy": "miepo.policy.policy.Policy"},  # imported for type checkers alone
    "autodoc_default_options": {"members": True, "show-inheritance": True},
    "python_use_unqualified_type_names": True,
    "nitpicky": True,
    "nitpick_ignore_regex": [("py:.*", name) for name in UNLINKED],
}


def public_modules() -> list[str]:
    """Return the import paths of miepo's modules, packages before what is in them."""
    files = (file.relative_to(ROOT).with_suffix("") for file in PACKAGE.rglob("*.py"))
    names = sorted(".".join(file.parts).removesuffix(".__init__") for file in files)
    return [name for name in names if name not in LEFT_OUT]


def write_sources(folder: Path, modules: Iterable[str]) -> list[str]:
    """Write a page for each package of miepo, and one for its single modules; return the names of the pages."""
    packages = {name for name in modules if (ROOT / Path(*name.split(".")) / "__init__.py").exists()}
    pages: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        top = ".".join(name.split(".")[:2])
        pages[top if top in packages else "miepo"].append(name)
    for page, names in pages.items():
        (folder / f"{page}.rst").write_text("\n".join([_title(page, "="), *map(_section, names)]))
    contents = "\n".join(f"   {page}" for page in pages)
    (folder / "index.rst").write_text(f"{_title('miepo', '=')}\n.. toctree::\n   :maxdepth: 2\n\n{contents}\n")
    return list(pages)


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def _section(module: str) -> str:
    """Return a module's members where they are defined; of a package also what it re-exports, with links there."""
    names = [f":py:obj:`{name} <{module}.{name}>`" for name in getattr(import_module(module), "__all__", ())]
    exported = f"\nTo be imported from here: {', '.join(names)}.\n" if names else ""
    return f"{_title(module, '-')}\n.. automodule:: {module}\n   :ignore-module-all:\n{exported}"


def link_to_definition(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Resolve a reference to a re-exported name, ``miepo.objectives.Brevity`` say, where the name is defined."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if not module.startswith("miepo"):
        return None
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None
    target = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def main() -> int:
    parser = ArgumentParser(prog="python -m tools.api_reference", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write; what is there is replaced")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of libraries that are imported
    modules = public_modules()
    with TemporaryDirectory() as temporary:
        sources = Path(temporary) / "sources"
        sources.mkdir()
        pages = write_sources(sources, modules)
        built = Path(temporary) / "html"
        app = Sphinx(
            sources, None, built, Path(temporary) / "doctrees", "html", confoverrides=SETTINGS,
            status=None, warningiserror=True, exception_on_warning=False,
        )  # fmt: skip
        app.connect("missing-reference", link_to_definition)
        app.build()
        if app.statuscode == 0:
            shutil.rmtree(options.out, ignore_errors=True)
            shutil.copytree(built, options.out)
            print(f"{len(modules)} modules on {len(pages)} pages: {options.out / 'index.html'}")
    return app.statuscode


if __name__ == "__main__":
    sys.exit(main())
