"""Which questions are for evaluation, which for GRPO, and which conversations for SFT: disjoint by question."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.forms.question_records import tool_conversation
from ray_pipeline.data.forms.turns import Conversation
from ray_pipeline.data.shared.cleaning import content_hash
from ray_pipeline.data.shared.decontaminate import Decontaminator, words
from ray_pipeline.data.sources.sources import (
    BUILTIN,
    BUILTIN_CHAT,
    BUILTIN_NO_TOOLS,
    BUILTIN_TOOLS,
    PROMPTS_BUILTIN,
    SFT_BUILTIN,
    parse_source,
    read_conversations,
    read_questions,
)
from ray_pipeline.data.tasks.mixes import (
    CHAT_MIX,
    GLANCE_SHARE,
    PROMPT_MIX,
    SFT_MIX,
    SMALL_TALK,
    TOOLS_MIX,
    TURNS,
    Mix,
    draw_unique,
)
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.data.tasks.reasoning_gym_source import gym_questions
from ray_pipeline.data.tasks.small_talk import exchange
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields

_SFT_MIXES: dict[str, Mix] = {
    BUILTIN: SFT_MIX, BUILTIN_CHAT: CHAT_MIX, BUILTIN_TOOLS: TOOLS_MIX, BUILTIN_NO_TOOLS: TOOLS_MIX,
}  # fmt: skip
_PROMPT_MIXES: dict[str, Mix] = {BUILTIN: PROMPT_MIX, BUILTIN_CHAT: CHAT_MIX, BUILTIN_TOOLS: TOOLS_MIX}


@dataclass
class QuestionSets:
    """Attributes:
    heldout: for evaluation alone. train: GRPO's prompts.
    duplicates: questions and conversations that appeared before.
    contaminated: conversations that give held-out questions away.
    tallies: source -> what became of its records; none of generated ones.
    """

    heldout: list[Question]
    train: list[Question]
    conversations: list[Conversation]
    duplicates: int = 0
    contaminated: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)


def same_question(text: str) -> str:
    """What two questions have in common when they are the same one: their words."""
    return " ".join(words(text)) or text.strip()


def gather_questions(config: PipelineFields) -> QuestionSets:
    """Questions and conversations of the config's sources.

    Raises:
        UserError: too few questions, or no conversation left.
    """
    sets = _prompts(config)
    name = config.data.sft
    if name in _SFT_MIXES:
        taken = {q.prompt for q in sets.heldout} | {q.prompt for q in sets.train}
        count = config.data.builtin_conversations
        drawn = draw_unique(_SFT_MIXES[name], config.seed, "conversations", count, taken)
        sets.conversations = [_demonstration(question, config.seed, name) for question in drawn]
        if name == BUILTIN_CHAT:
            sets.conversations = _talks(sets.conversations, config.seed)
    else:
        _add_conversations(sets, config)
    if len(sets.conversations) < 2:
        raise UserError(
            f"--sft-data {config.data.sft}: {len(sets.conversations)} conversations are left after removing duplicates "
            "and held-out questions, but at least 2 are needed. Give a larger file."
        )
    return sets


def _demonstration(question: Question, seed: int, source: str) -> Conversation:
    """The question worked out or, for a share of them, answered at a glance; with the calculator or always without."""
    if source == BUILTIN_TOOLS:
        return tool_conversation(question)
    glance = source == BUILTIN_NO_TOOLS or Random(f"{seed}/glance/{question.prompt}").random() < GLANCE_SHARE
    return _turns(question.prompt, question.at_a_glance if glance else question.completion)


def _talks(demonstrations: list[Conversation], seed: int) -> list[Conversation]:
    """Small talk between the demonstrations, and half of all as conversations of several turns."""
    rng, turns = Random(f"{seed}/small talk"), []
    for demonstration in demonstrations:
        turns.append(demonstration)
        if rng.random() < SMALL_TALK:
            turns.append(_turns(*exchange(rng)))
    out = []
    while turns:
        count = rng.choice(TURNS)
        out.append(Conversation(tuple(message for turn in turns[-count:] for message in turn.messages)))
        del turns[-count:]
    return out


def _turns(prompt: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def _prompts(config: PipelineFields) -> QuestionSets:
    data = config.data
    if data.prompts in _PROMPT_MIXES:
        mix = _PROMPT_MIXES[data.prompts]
        heldout = draw_unique(mix, config.seed, "heldout", data.heldout_questions)
        taken = {q.prompt for q in heldout}
        return QuestionSets(heldout, draw_unique(mix, config.seed, "prompts", data.builtin_prompts, taken), [])
    source, tally = parse_source(data.prompts, PROMPTS_BUILTIN), Tally.of(data)
    tally.checked = source.kind == "file"
    if source.kind == "gym":
        size = source.size or data.heldout_questions + data.builtin_prompts
        drawn = gym_questions(source.location, min(size, data.max_documents or size), config.seed)
        # Puzzles may differ in signs alone.
        questions, duplicates = _unique(drawn, str)
    else:
        questions, duplicates = _unique(read_questions(source, data.max_documents, tally), same_question)
    if len(questions) < 2:
        raise UserError(
            f"--prompt-data {data.prompts}: holds {len(questions)} different questions, but at least 2 are needed, "
            "one for training and one for evaluation. Give a larger file."
        )
    # By hash: the same questions are held out however the file is ordered. A fifth at most, so training keeps most.
    count = min(data.heldout_questions, max(1, len(questions) // 5))
    heldout = sorted(questions, key=lambda q: content_hash(same_question(q.prompt)))[:count]
    chosen = {q.prompt for q in heldout}
    train = [q for q in questions if q.prompt not in chosen]
    return QuestionSets(heldout, train, [], duplicates, tallies={f"--prompt-data {data.prompts}": tally})


def _unique(questions: Iterable[Question], key: Callable[[str], str]) -> tuple[list[Question], int]:
    """The first question of each key, and how many more there were."""
    kept: dict[str, Question] = {}
    count = 0
    for count, question in enumerate(questions, start=1):  # noqa: B007  the count is used after the loop
        kept.setdefault(key(question.prompt), question)
    return list(kept.values()), count - len(kept)


def _add_conversations(sets: QuestionSets, config: PipelineFields) -> None:
    """Conversations of a file or hub source; held-out questions go, and a question shared with GRPO goes to one side.

    The hash of a shared question tells its side, so that one file can serve both `--sft-data` and `--prompt-data`.
    """
    heldout = Decontaminator((q.prompt for q in sets.heldout), config.data.decontaminate_ngram)
    for_grpo = {same_question(q.prompt) for q in sets.train}
    for_sft, seen = set(), set()
    source, tally = parse_source(config.data.sft, SFT_BUILTIN), Tally.of(config.data)
    tally.checked = source.kind == "file"
    sets.tallies[f"--sft-data {config.data.sft}"] = tally
    for conversation in read_conversations(source, config.data.max_documents, tally):
        text, whole = conversation.text, content_hash(repr(conversation))
        if whole in seen:  # the same words with other tools, or learned from elsewhere, teach something else
            sets.duplicates += 1
            continue
        seen.add(whole)
        question = same_question(conversation.question)
        if heldout.contaminated(text):
            sets.contaminated += 1
            continue
        if question in for_grpo:
            if int(content_hash(question)[-1], 16) % 2:
                continue
            for_sft.add(question)
        sets.conversations.append(conversation)
    left = [q for q in sets.train if same_question(q.prompt) not in for_sft]
    if not left:
        raise UserError(
            f"--prompt-data {config.data.prompts}: every question also is in --sft-data, and too few are there to "
            "share. Give different or larger files."
        )
    sets.train = left
