"""Which pairs of answers DPO learns from: none that gives an evaluation question away, none twice."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.forms.preference_records import Preference
from ray_pipeline.data.sets.question_sets import QuestionSets
from ray_pipeline.data.shared.cleaning import content_hash
from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.data.sources.sources import BUILTIN, parse_source, read_preferences
from ray_pipeline.data.tasks.mixes import PREFERENCE_MIX, draw_unique
from ray_pipeline.data.tasks.preference_pairs import preference_answers
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields


@dataclass
class PreferenceSet:
    """Attributes:
    pairs: in the source's order. duplicates: pairs that appeared before.
    ties: pairs whose answers are the same. contaminated: pairs that give held-out questions away.
    tally: what became of the source's records.
    """

    pairs: list[Preference] = field(default_factory=list)
    duplicates: int = 0
    ties: int = 0
    contaminated: int = 0
    tally: Tally = field(default_factory=Tally)

    def counts(self) -> dict[str, int]:
        """For the metrics."""
        return {
            "preference_duplicates": self.duplicates,
            "preference_ties": self.ties,
            "preferences_contaminated": self.contaminated,
        }


def gather_preferences(config: PipelineFields, sets: QuestionSets) -> PreferenceSet:
    """Pairs of the config's source.

    Raises:
        UserError: fewer than two are left.
    """
    data = config.data
    if data.preferences == BUILTIN:
        return PreferenceSet(_builtin(config, sets))
    heldout = Decontaminator((q.prompt for q in sets.heldout), data.decontaminate_ngram)
    source = parse_source(data.preferences)
    out, seen = PreferenceSet(tally=Tally.of(data, checked=source.kind == "file")), set()
    for pair in read_preferences(source, data.max_documents, out.tally):
        key = content_hash(repr(pair))
        if pair.chosen == pair.rejected:
            out.ties += 1
        elif key in seen:
            out.duplicates += 1
        elif heldout.contaminated(pair.question):
            out.contaminated += 1
        else:
            seen.add(key)
            out.pairs.append(pair)
    if len(out.pairs) < 2:
        raise UserError(
            f"data.preferences={data.preferences}: {len(out.pairs)} pairs are left (the same answer twice "
            f"{out.ties}, duplicates {out.duplicates}, holding evaluation questions {out.contaminated}), but at least "
            "2 are needed. Give a larger file."
        )
    return out


def _builtin(config: PipelineFields, sets: QuestionSets) -> list[Preference]:
    """As many pairs as there are built-in prompts and held-out questions, to questions of their own."""
    data = config.data
    taken = {q.prompt for q in sets.heldout} | {q.prompt for q in sets.train} | {c.question for c in sets.conversations}
    count = data.builtin_prompts + data.heldout_questions
    out = []
    for question in draw_unique(PREFERENCE_MIX, config.seed, "preferences", count, taken):
        chosen, rejected = preference_answers(question, config.seed)
        asked = {"role": "user", "content": question.prompt}
        out.append(Preference((asked,), _said(chosen), _said(rejected)))
    return out


def _said(content: str) -> tuple[dict[str, str]]:
    return ({"role": "assistant", "content": content},)
