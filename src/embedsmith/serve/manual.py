"""The page of the API, written from its OpenAPI description: plain HTML, without a script and without anything from
elsewhere."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 54rem; margin: 0 auto; padding: 1rem; }
section { border-top: 1px solid #8886; padding: .5rem 0 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .2rem .6rem .2rem 0;
vertical-align: top; } code { font-family: ui-monospace, monospace; } .scroll { overflow-x: auto; }
"""


def manual(openapi: Mapping[str, Any]) -> str:
    """One page for people; programs read /openapi.json."""
    title = escape(openapi["info"]["title"])
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: the API</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>{title} {escape(openapi['info']['version'])}</h1><p>{escape(openapi['info'].get('description', ''))} ",
        'For programs: <a href="openapi.json">openapi.json</a>.</p>',
    ]
    schemas = openapi.get("components", {}).get("schemas", {})
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            name, about = f"{method.upper()} {path}", operation.get("description", "")
            parts.append(f"<section><h2><code>{escape(name)}</code></h2><p>{escape(about)}</p>")
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
            if schema in schemas:
                parts.append(_keys(schemas[schema]))
            parts.append("</section>")
    return "".join([*parts, "</body></html>"])


def _keys(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{escape(_type(value))}</td>"
        f"<td>{'required' if key in required else escape(json.dumps(value.get('default')))}</td>"
        f"<td>{escape(value.get('description', ''))}</td></tr>"
        for key, value in schema["properties"].items()
    )
    about = escape(schema.get("description", ""))
    head = "<tr><th>key</th><th>type</th><th>default</th><th></th></tr>"
    return f'<p>{about}</p><div class="scroll"><table>{head}{rows}</table></div>'


def _type(value: Mapping[str, Any]) -> str:
    """A schema in words."""
    if "enum" in value or "const" in value:
        return " | ".join(map(str, value.get("enum", [value.get("const")])))
    if kinds := value.get("anyOf") or value.get("oneOf"):
        return " | ".join(dict.fromkeys(_type(kind) for kind in kinds if kind.get("type") != "null"))
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    return str(value.get("type", "any"))
