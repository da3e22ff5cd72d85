"""Generation at a dial: who decides what a decoding step uses, and who owns its cache. Ships with every exported model.

transformers' own ``generate`` runs the loop. The prompt is read at ``Dial.prompt``, the full dial unless it says
otherwise; what is generated uses the dial itself, whose mean cost a controller holds. The key-value cache
(``past_key_values``) is made for the call, belongs to it and is filled at whatever dial each step ran; nothing of ours
is kept in it. The dial is that of the surrounding call: :meth:`DialedGeneration.generate` sets it for all steps of its
thread, and a step that names its own (``dial=``) wins. A draft model (``assistant_model``) keeps the dial that it has
itself: ``model.at(0.25)`` drafts at .25 with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dynaconv.dynamic.dial import Dial, DialLike, as_dial
from dynaconv.dynamic.per_thread import PerThread
from dynaconv.dynamic.policy import Policy
from dynaconv.dynamic.thresholds import Thresholds


class Surrounding(PerThread):
    """What calls of one model use in this thread where they name no dial of their own.

    Attributes:
        policy: That of the surrounding ``generate``; ``None`` outside of one: the model's own dial.
        prompt: What its prompt is read under.
        prompt_tokens: How many tokens it has; 0 where that is not known.
        reading: Whether the prompt is being read.
        thresholds: Of the outermost ``generate``; one inside another has its own.
    """

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.prompt: Policy | None = None
        self.prompt_tokens = 0
        self.reading = False
        self.thresholds = Thresholds()


class DialedGeneration:
    """Mixin: ``generate`` with a dial."""

    surrounding: Surrounding
    dial: Dial

    def policy(self, dial: DialLike, *, held: Thresholds | None = None) -> Policy:
        """Of the model."""
        raise NotImplementedError

    def controlled(self, policy: Policy, dials: Dial | Sequence[Dial]) -> Policy:
        """``policy`` with a controller, where ``dials`` want one."""
        raise NotImplementedError

    def generate(self, *args: Any, dial: DialLike | None = None, **kwargs: Any) -> Any:
        """Stock ``generate`` at ``dial``: a budget, a :class:`Dial`, or one for each sequence of the batch.

        With a draft (``assistant_model``, ``prompt_lookup_num_tokens``) no controller runs, so that tokens do not
        depend on what was drafted.
        """
        if dial is None and self.surrounding.policy is not None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        drafted = any(kwargs.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens"))
        drafting = getattr(kwargs.get("generation_config"), "is_assistant", False)
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((one.shape[1] for one in given if one is not None), 0)
        with self.dialed(self.dial if dial is None else dial, controlled=not (drafted or drafting), prompt=prompt):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def dialed(self, dial: DialLike, *, controlled: bool = False, prompt: int = 0) -> Iterator[None]:
        """Calls inside that name no dial use ``dial``, in this thread, and prompts are read at ``dial.prompt``.

        Args:
            dial: See :func:`as_dial`.
            controlled: Hold the budget, where the dial wants it held.
            prompt: Tokens of the prompt.
        """
        around, dials = self.surrounding, as_dial(dial)
        before = around.policy, around.prompt, around.prompt_tokens
        policy = self.policy(dial, held=around.thresholds if around.policy is None else None)
        around.policy = self.controlled(policy, dials) if controlled else policy
        around.prompt, around.prompt_tokens = self._prompt_policy(dials), prompt
        try:
            yield
        finally:
            around.policy, around.prompt, around.prompt_tokens = before

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any) -> Any:
        """The stock one's; the first forward pass of assisted generation reads the prompt, too."""
        self.surrounding.reading = self.surrounding.reading or bool(is_first_iteration)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            *args, is_first_iteration=is_first_iteration, **kwargs
        )

    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        """The stock one's, which reads the prompt; a draft model calls it again for each draft."""
        cache = model_kwargs.get("past_key_values")
        again = generation_config.is_assistant and cache is not None and cache.get_seq_length() > 0
        self.surrounding.reading = not again
        try:
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, *args, **kwargs
            )
        finally:
            self.surrounding.reading = False

    def _prompt_policy(self, dials: Dial | Sequence[Dial]) -> Policy:
        if isinstance(dials, Dial):
            return self.policy(dials.prompt or Dial.full())
        return self.policy([dial.prompt or Dial.full() for dial in dials])
