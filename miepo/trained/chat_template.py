"""The prompt of a policy as a chat template that Transformers and vLLM render."""

from __future__ import annotations

from miepo.errors import UserError
from miepo.policy import Policy, PromptConditioning
from miepo.preferences import ROUNDING

# -- the chat template -------------------------------------------------------------------------------------------------


# messages whose content may come in parts, as one text each
TEXT_OF_PARTS = """\
{%- set all = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- if m['content'] is string or m['content'] is none -%}
{%- set all.messages = all.messages + [m] -%}
{%- elif m['content'] | rejectattr('type', 'equalto', 'text') | list -%}
{{- raise_exception('this model reads text alone') -}}
{%- else -%}
{%- set all.messages = all.messages + [dict(m, content=m['content'] | map(attribute='text') | join)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = all.messages -%}
"""
# refuses what parse_preference does
WEIGHTS = """\
{%%- for name, weight in (preference or {}).items() -%%}
{%%- if name not in [%(names)s] -%%}
{{- raise_exception('unknown objective ' ~ name ~ '; the objectives are ' ~ %(said)s) -}}
{%%- elif weight is not number or weight is boolean or not 0 <= weight <= 1e9 -%%}
{{- raise_exception('the weight of ' ~ name ~ ' must be a number that is not negative, got ' ~ weight) -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if preference and ((preference.values() | sum) - 1) | abs > %(rounding)s -%%}
{{- raise_exception('expected weights that sum to 1, got a sum of ' ~ (preference.values() | sum)) -}}
{%%- endif -%%}
"""


def chat_template(policy: Policy, text: str, free: bool = False) -> str:
    """Return a Jinja chat template that writes what the policy reads.

    Args:
        policy: Whose prompt template it is.
        text: A Jinja expression of the text that states the preference, after that of the last message.
        free: Whether ``text`` is of any ``preference``, which is checked then.
    """
    template = policy.template
    head = TEXT_OF_PARTS
    if free:
        names = ", ".join(_literal(name) for name in policy.names)
        head += WEIGHTS % {"names": names, "said": _literal(", ".join(policy.names)), "rounding": ROUNDING}
    start = policy.tokenizer.decode(template.start)  # what the tokenizer alone would put in front
    if template.chat:
        original = policy.tokenizer.chat_template
        if isinstance(original, dict):  # by name
            original = original["default"]
        thinking = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
        return (
            head
            + (f"{{{{- {_literal(start)} -}}}}" if start else "")
            + (thinking if "enable_thinking" in original else "")
            + "{%- if messages[-1]['role'] == 'user' -%}{%- set messages = messages[:-1] + "
            f"[dict(messages[-1], content=messages[-1]['content'] + ({text}))] -%}}{{%- endif -%}}{original}"
        )
    prefix, suffix = _literal(start + template.prefix), _literal(template.suffix)
    if template.dialogue:
        turns = (
            "{%- for m in messages -%}{%- if m['role'] not in ['user', 'assistant'] -%}"
            "{{- raise_exception('this model reads messages of user and assistant, got ' ~ m['role']) -}}{%- endif -%}"
            "{{- '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant'}[m['role']] + ': ' + m['content'] -}}"
            "{%- endfor -%}"
        )
        return f"{head}{{{{- {prefix} -}}}}{turns}{{{{- ({text}) + {suffix} -}}}}"
    one = "{{- raise_exception('this model answers one message at a time') -}}"
    return (
        f"{head}{{%- if messages | length != 1 -%}}{one}{{%- endif -%}}"
        f"{{{{- {prefix} + messages[0]['content'] + ({text}) + {suffix} -}}}}"
    )


def _literal(text: str) -> str:
    """Return a Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\r", "\\r").replace("\n", "\\n") + "'"


def preference_expression(policy: Policy) -> str:
    """Return the text of any preference as a Jinja expression of ``preference``, weights by name.

    Equal weights without it.

    Raises:
        UserError: a conditioning writes in a way of its own.
    """
    names, parts = policy.names, []
    for conditioning in policy.conditioning:
        if type(conditioning) is PromptConditioning:
            for name in names:
                weight = f"(preference or {{}}).get({_literal(name)}, 0 if preference else {1 / len(names)!r})"
                form = f"'%.{conditioning.decimals}f'"
                parts += [
                    _literal(f" <{name}> "),
                    f"({form} | format({weight} | float | round({conditioning.digits})))",
                ]
        elif conditioning.write([1 / len(names)] * len(names), names):
            raise UserError(
                f"{type(conditioning).__name__} cannot be written as a template for every preference: "
                "expected a --preference to export, got none"
            )
    return " + ".join(parts) or "''"
