"""Model cards: metadata for the Hub, the code that loads the model, and a table of facts about it."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


TEXT = """# {title}

```python
{code}
```

The code is in a package: `pip install {library}`.{note}

| | |
|---|---|
{rows}
"""


def make_card(
    title: str,
    code: str,
    facts: Mapping[str, object],
    *,
    library: str = "diffusers_sana",
    note: str = "",
    base_model: str | None = None,
    relation: str | None = None,
    **metadata: Any,
) -> ModelCard:
    """A model card.

    Args:
        title: id of the repository, or name of the folder.
        code: loads the model.
        facts: rows of the table; those that are None are left out.
        library: the package that `code` imports.
        note: more text after the line that names the package.
        base_model: id of the model that this one was made from, if known.
        relation: what it is to that model: "adapter", "finetune" or "quantized".
        metadata: other fields of `ModelCardData`.
    """
    rows = {"base model": base_model and f"[{base_model}](https://huggingface.co/{base_model})", **facts}
    data = ModelCardData(base_model=base_model, **metadata)
    if base_model and relation:
        data["base_model_relation"] = relation
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    text = TEXT.format(title=title, code=code, library=library, note=note, rows=table)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
