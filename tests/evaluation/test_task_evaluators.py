import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from src.build import build_model
from src.components.cache import Cache
from src.datamodules.task import TaskDataModule
from src.datamodules.tasks import Brevo, Capo, Depo, Lano, Mano
from src.datamodules.tasks.capo import ceiling_bits
from src.evaluation.choice import evaluator_class
from src.evaluation.evaluators import targets_of
from src.evaluation.task_evaluators import CapoEvaluator, LanoEvaluator, TaskEvaluator


def windows(task, length, count=6, split="val", seed=0) -> dict[str, Any]:
    data = TaskDataModule(task, window=length, batch_size=1, val_windows=count, test_windows=count, seed=seed)
    found = data.source.windows(split, 0, count)
    return {
        name: torch.from_numpy(array).long() if array.dtype != bool else torch.from_numpy(array)
        for name, array in found.items()
    }


def certain(targets, vocab_size):
    """Logits of a model that is sure of these tokens."""
    return torch.nn.functional.one_hot(targets, vocab_size).float() * 50


def nll_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")


class Oracle(nn.Module):
    """Writes what it was told for each prompt, looked up by the prompt's tokens; a stand-in for a Backbone."""

    def __init__(self, answers, vocab_size):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.answers, self.vocab_size = answers, vocab_size
        self.batches = 0

    def initial_state(self):
        return Cache([{}])

    def forward(self, ids, *, segments, state, select):
        if not state[0]:
            self.batches += 1
            real = torch.ones_like(ids) > 0 if segments is None else segments >= 0
            prompts = [tuple(row[keep].tolist()) for row, keep in zip(ids, real, strict=True)]
            longest = max(map(len, self.answers.values()))
            texts = torch.tensor([[*self.answers[p], *[0] * (longest - len(self.answers[p]))] for p in prompts])
            position = torch.zeros(len(texts), dtype=torch.long)
        else:
            texts, position = state[0]["texts"], state[0]["position"]
        rows = torch.arange(len(texts))
        logits = certain(texts[rows, position.clamp(max=texts.shape[1] - 1)], self.vocab_size)
        return logits, Cache([{"texts": texts, "position": position + 1}])


def answers_of(task, count, change=lambda text: text):
    found = {}
    for i in range(count):
        tokens, _ = task.example(0, "val", i)
        start = task.prompt_length(tokens)
        found[tuple(tokens[:start].tolist())] = change(tokens[start:].tolist())
    return found


@pytest.mark.parametrize("multi", [False, True])
def test_written_answers_are_scored_by_difficulty(multi):
    task = Brevo(N=8, multi_token=multi, compact_ids=True)
    evaluator = TaskEvaluator(task, seed=0, split="val", written=50, batch_size=16)
    net: Any = Oracle(answers_of(task, 50), task.vocab_size)
    evaluator.examine(net)
    assert net.batches == 4
    found = {name: float(value) for name, value in evaluator.compute().items()}
    assert found["accuracy"] == found["official"] == 1
    assert evaluator.counts["accuracy"] == evaluator.counts["official"] == (50, 50)
    groups = [pair for name, pair in evaluator.counts.items() if name.startswith("accuracy/")]
    assert sum(total for _, total in groups) == 50
    assert len(groups) > 1


def test_what_is_wrong_or_never_ends_is_no_answer():
    task = Brevo(N=8, compact_ids=True)
    limit = task.generation.max_new_tokens
    for change, official in [
        (lambda text: [text[0], *text], 1),  # a node twice
        (lambda text: [text[0]] * (limit + 5), 0),  # never ends
        (lambda text: text[1:], 0),
    ]:
        evaluator = TaskEvaluator(task, 0, "val", 30, 8)
        net: Any = Oracle(answers_of(task, 30, change), task.vocab_size)
        evaluator.examine(net)
        found = evaluator.compute()
        assert evaluator.counts["accuracy"] == (0, 30)
        assert float(found["official"]) == official


def test_ranks_that_do_not_count_add_nothing():
    task = Brevo(N=5, compact_ids=True)
    evaluator = TaskEvaluator(task, 0, "val", 10, 8)
    net: Any = Oracle(answers_of(task, 10), task.vocab_size)
    evaluator.examine(net, count=False)
    assert float(evaluator.group_total.sum()) == 0


@pytest.mark.parametrize("task", [Depo(N=8, K=2, mini_vocab=8, word_length=(1, 2)), Mano(L=3, test_lengths="all")])
def test_teacher_forced_tasks_need_no_writing(task):
    batch = windows(task, 128)
    targets = targets_of(batch)
    evaluator = evaluator_class(task)(task, 0, "val", 0, 8)
    logits = certain(targets, task.vocab_size)
    evaluator.update(batch, logits, nll_of(logits, targets))
    found = evaluator.compute()
    assert float(found["accuracy"]) == 1
    assert float(found["token_accuracy"]) == 1
    assert set(found) == {"loss", "token_accuracy", "accuracy"} | {f"accuracy/{group}" for group in task.groups}
    evaluator.reset()
    logits = certain((targets + 1) % task.vocab_size, task.vocab_size)
    evaluator.update(batch, logits, nll_of(logits, targets))
    assert float(evaluator.compute()["accuracy"]) == 0
    assert evaluator.counts["accuracy"][0] == 0


def lano_logits(task, batch, flatten=0.0):
    """Logits of the grammar's own distributions where they are known, mixed with the uniform one."""
    logits = torch.full((*batch["tokens"][:, 1:].shape, task.vocab_size), -30.0)
    for row, tokens in enumerate(batch["tokens"].tolist()):
        ends = [t for t in range(1, len(tokens)) if tokens[t] == task.stop_id]
        if ends:
            exact = task.next_token_distribution(tokens[1 : ends[0]])
            mixed = (1 - flatten) * exact + flatten / exact.shape[1]
            columns = [task.stop_id, *range(1, task.language.terminals + 1)]
            logits[row, : ends[0], columns] = torch.from_numpy(np.log(mixed + 1e-12)).float()
    return logits


@pytest.mark.parametrize("terminator", ["bos", "eos"])
def test_a_model_of_the_grammar_has_no_divergence(terminator):
    task = Lano(grammar="cfg3f", levels=3, terminator=terminator)
    batch = windows(task, 40, count=20)
    targets = targets_of(batch)
    found = {}
    for flatten in (0.0, 1.0):
        evaluator = LanoEvaluator(task, 0, "val", 10, 8)
        logits = lano_logits(task, batch, flatten).flatten(0, 1)
        evaluator.update(batch, logits, nll_of(logits, targets))
        found[flatten] = {name: float(value) for name, value in evaluator.compute().items()}
        assert float(evaluator.distribution_sums[3]) == 20  # no sentence of three levels is longer than 27
    assert found[0.0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found[1.0]["kl"] > 0.3
    assert found[0.0]["leaked"] == pytest.approx(0, abs=1e-6)
    assert found[0.0]["entropy"] == found[1.0]["entropy"] > 0.3


@pytest.mark.parametrize("terminator", ["bos", "eos"])
@pytest.mark.parametrize(("grammar", "levels", "length"), [("cfg3f", 3, 256), ("cfg3k", 3, 61), ("cfg3f", 4, 60)])
def test_the_entropy_is_the_expected_loss_of_a_perfect_model(grammar, levels, length, terminator):
    """Over everything that is scored: what a model that knows the grammar loses differs by chance alone."""
    task = Lano(grammar=grammar, levels=levels, terminator=terminator)
    batch = windows(task, length, count=64)
    truth = []  # of each target its row over the whole vocabulary
    for row in batch["tokens"].numpy():
        starts = [*np.flatnonzero(row == task.bos_id), length]
        for start, end in pairwise(starts):
            bare = [int(t) for t in row[start + 1 : end] if t != task.eos_id]
            exact = task.next_token_distributions([bare], whole=False)[0]
            rows = np.zeros(
                (end - start, task.vocab_size)
            )  # after <bos>, and after each token up to the next one's <bos>
            rows[: len(exact), [task.stop_id, *range(1, task.language.terminals + 1)]] = exact[: end - start]
            rows[len(exact) :, task.bos_id] = 1  # behind <eos>
            truth.append(rows[: end - start - (end == length)])
    rows = torch.from_numpy(np.concatenate(truth))
    targets = targets_of(batch)
    assert len(rows) == len(targets)
    logits = rows.clamp(min=1e-30).log()
    evaluator = LanoEvaluator(task, 0, "val", 10, 8)
    nll = nll_of(logits, targets)
    evaluator.update(batch, logits, nll)
    found = {name: float(value) for name, value in evaluator.compute().items()}
    nats = -(rows * logits).sum(dim=-1)
    assert found["entropy"] == pytest.approx(float(nats.mean()), abs=1e-6)
    assert abs(found["loss"] - found["entropy"]) < 4 * float((nll - nats).std()) / len(nll) ** 0.5
    assert 0 < found.get("kl_sentences", 64) <= 64


def test_a_model_that_writes_sentences_is_right():
    task = Lano(grammar="cfg3f", levels=3)
    sentence = task.example(5, "train", 3)[0][1:].tolist()
    for text, right in (([*sentence, 0], 8), ([*sentence[:-1], 0], 0), (sentence * 9, 0)):
        evaluator = LanoEvaluator(task, 0, "val", 8, 8)
        net: Any = Oracle({(0,): text}, task.vocab_size)
        evaluator.examine(net)
        evaluator.compute()
        assert evaluator.counts["accuracy"] == (right, 8)


def capo_found(task, batch, logits, targets, parameters=None):
    evaluator = CapoEvaluator(task, 0, "val", 0, 8)
    if parameters:
        evaluator.parameters_of_model = parameters
    evaluator.update(batch, logits, nll_of(logits, targets))
    return {name: float(value) for name, value in evaluator.compute().items()}


def test_capacity_of_one_who_knows_all_and_of_one_who_knows_nothing():
    task = Capo(num_people=40, exposures=2)
    batch = windows(task, 512)
    targets = targets_of(batch)
    # Sure of every token but the first of a name, of which each person's is as likely: ln N nats a name.
    logits = certain(targets, task.vocab_size)
    kinds = batch["kinds"]
    starts = ((kinds[:, 1:] == 1) & (kinds[:, :-1] != 1))[batch["loss_mask"][:, 1:]]
    logits[starts] = 0
    logits[starts, targets[starts]] = math.log((task.vocab_size - 1) / (task.num_people - 1))
    found = capo_found(task, batch, logits, targets, parameters=1000)
    assert found["bits_per_person"] == pytest.approx(ceiling_bits(40) / 40, abs=1e-3)
    assert found["bits_per_parameter"] == pytest.approx(found["bits_per_parameter_ceiling"], rel=1e-4)
    assert found["accuracy"] == 1
    untrained = capo_found(task, batch, torch.zeros(len(targets), task.vocab_size), targets)
    assert untrained["bits_per_person"] == 0  # uniform over all words is worse than uniform over the pools
    assert "bits_per_parameter" not in untrained


def test_capacity_counts_the_model_s_own_parameters():
    task = Capo(num_people=40)
    net = build_model([f"model.vocab_size={task.vocab_size}", "model.dim=16"])
    evaluator = CapoEvaluator(task, 0, "val", 0, 8)
    evaluator.examine(net)
    assert evaluator.parameters_of_model == sum(parameter.numel() for parameter in net.parameters())


def test_every_task_has_its_evaluator():
    for task, kind in ((Depo(N=5), TaskEvaluator), (Lano(), LanoEvaluator), (Capo(num_people=5), CapoEvaluator)):
        assert evaluator_class(task) is kind
