"""The texts of one set of experts: calibration, test questions, and text that no calibration shows. All disjoint."""

from dataclasses import dataclass

from tiny_experts.evaluate import chat_answer, chat_prompt
from tiny_experts.example import Example
from transformers import PreTrainedTokenizerBase

from quality.expert_sets import ExpertSet

CALIBRATION_SEED = 1000  # far from the seeds of all trainings
TEST_SEED = 2000
ELSEWHERE_QUESTIONS = 48  # that each expert is asked from the other experts' skills
LEFT_OUT_QUESTIONS = 48  # of each expert


@dataclass(frozen=True)
class Questions:
    """Questions of each expert, by its name."""

    calibration: dict[str, list[Example]]
    tests: list[dict[str, list[Example]]]  # independent draws
    unseen: dict[str, list[Example]]  # of an expert's own kind, for the other experts' faithfulness
    left_out: dict[str, list[Example]]  # of families that calibration does not show; empty lists where it shows all
    lines: list[str]  # plain text, as it is
    instructions: list[Example]  # that have nothing to do with any expert

    def elsewhere(self, name: str) -> list[Example]:
        """Questions that the other experts were trained for, as many of each."""
        others = [questions for other, questions in self.unseen.items() if other != name]
        return [question for same_rank in zip(*others, strict=True) for question in same_rank][:ELSEWHERE_QUESTIONS]


def draw_questions(expert_set: ExpertSet, texts: int, tests: int, draws: int, seed: int) -> Questions:
    """All texts for one seed: `texts` of calibration and `draws` times `tests` test questions an expert."""
    calibration, unseen, left_out = {}, {}, {}
    drawn: list[dict[str, list[Example]]] = [{} for _ in range(draws)]
    for expert in expert_set.experts:
        calibration[expert.name] = expert_set.draw(expert, "train", texts, CALIBRATION_SEED + seed)
        pool = expert_set.draw(expert, "test", draws * tests + ELSEWHERE_QUESTIONS, TEST_SEED + seed)
        for number, draw in enumerate(drawn):
            draw[expert.name] = pool[number * tests : (number + 1) * tests]
        unseen[expert.name] = pool[draws * tests :]
        left_out[expert.name] = (
            expert_set.draw(expert, "test", LEFT_OUT_QUESTIONS, TEST_SEED + seed, left_out=True)
            if expert_set.left_out
            else []
        )
    lines, instructions = expert_set.lines(TEST_SEED + seed), expert_set.instructions()
    questions = Questions(calibration, drawn, unseen, left_out, lines, instructions)
    check_disjoint(questions)
    return questions


def check_disjoint(questions: Questions) -> None:
    """No text stands in two of the parts.

    Raises:
        ValueError: one does.
    """
    parts = {
        "calibration": [questions.calibration],
        "test": questions.tests,
        "faithfulness": [questions.unseen],
        "left out": [questions.left_out],
        "unrelated": [{"": questions.instructions}],
    }
    place = dict.fromkeys(questions.lines, "plain lines")
    for part, tables in parts.items():
        prompts = {question.prompt for table in tables for group in table.values() for question in group}
        for prompt in prompts:
            if prompt in place:
                raise ValueError(f"{prompt!r} is both a {place[prompt]} and a {part} text")
            place[prompt] = part


def question_text(tokenizer: PreTrainedTokenizerBase, question: Example) -> str:
    """A question with its answer, as the experts were trained on it."""
    return chat_prompt(tokenizer, question.prompt) + chat_answer(tokenizer, question)
