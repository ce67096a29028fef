"""The pipelines of both packages, whose prompts are compared."""

from tests.pipelines.conftest import ours as ours
from tests.pipelines.conftest import upstream as upstream
