"""Tiny strategies that use the words of the interface, one or a few each."""

from dataclasses import dataclass

import torch

from fedsim import GroupMeans, Rows, Update, Wrapper
from fedsim.strategies.averaging.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class Objective(FedAvg):
    """Two models, one of them the client's own; every rule of `train`, and all that `local` tells."""

    broadcast = ("model", "personal")

    def init_server(self, model):
        return {"model": model, "personal": model}

    def init_client(self, model, layout):
        return {"personal": model}

    def client_update(self, server, client, local):
        x, own = server["model"], local.separate("personal", epochs=2, lr=0.03)
        head = local.layout.mask(local.layout.head.__contains__).to(x.device)

        def ascent(w, batch):
            g, _ = noisy.gradient(w, batch)
            return noisy.gradient(w + 0.05 * g / g.norm(), batch)

        def contrast(w, batch):
            (z, logits), (anchor, _) = (local.features(model, batch.x) for model in (w, x))
            return local.label_losses(logits, batch).mean() + 0.1 * (z - anchor).square().mean()

        def weighted(w, batch):
            losses = own.losses(w, batch)
            return (losses * own.uniform(losses)).mean()

        noisy = local.with_batches(lambda batch: batch._replace(x=batch.x + 0.01 * local.normal(batch.x)))
        y = noisy.train(x, gradient=ascent, after_step=lambda w: w.clamp(-1, 1))
        y = local.train(y, loss=contrast, only=head)
        v = own.train(client["personal"], loss=weighted, correct=lambda g, w: g + 0.01 * own.normal(g))
        delta = y - x + 1e-3 * (local.round + 1) * local.uniform(x)
        return Update({"delta": delta, "personal": v}, local.num_examples, {"personal": v})

    def server_update(self, server, mean, info):
        return super().server_update(server, mean, info) | {"personal": mean["personal"]}

    def max_steps(self, num_steps, epoch_steps):
        return 2 * num_steps


@dataclass(frozen=True, kw_only=True)
class AllRows(FedAvg):
    """The mean of the two messages in the middle of the cohort, and of their statistics."""

    aggregator = Rows()

    def server_update(self, server, rows, info):
        return {"model": server["model"] + rows["delta"][1:3].mean(0)}

    def server_buffers(self, rows, info):
        return rows[1:3].mean(0)


@dataclass(frozen=True, kw_only=True)
class PublicExamples(FedAvg):
    """The server trains on its own examples, as far as the clients' loss there is large."""

    uses_public = True

    def server_update(self, server, mean, info):
        x = server["model"] + mean["delta"]
        return {"model": x + info.public.loss(x) * (info.public.train(x) - x)}


@dataclass(frozen=True, kw_only=True)
class Surveyed(FedAvg):
    """The two clients with the largest losses train, from a model that the survey has moved."""

    broadcast = ("model", "mean_loss")

    def init_server(self, model):
        return {"model": model, "mean_loss": model.new_zeros(())}

    def survey(self, server, client, local):
        f = local.loss(server["model"])
        return Update({"loss": f, "losses": f * (local.cohort == local.client_id)}, weight=1.0)

    def surveyed(self, server, mean, info):
        return {"mean_loss": mean["loss"]}

    def select(self, server, mean, info):
        return [info.cohort[i] for i in mean["losses"].topk(2).indices.tolist()]

    def client_update(self, server, client, local):
        x = server["model"] * (1 - 0.01 * server["mean_loss"])
        return Update({"delta": local.train(x) - x}, local.num_examples)


@dataclass(frozen=True, kw_only=True)
class Personalised(FedAvg):
    """Each client evaluates a model that it has trained further."""

    def personalise(self, server, client, local):
        own = local.separate("own", epochs=2)
        return own.train(server["model"]), own.buffers


@dataclass(frozen=True, kw_only=True)
class Numbers(FedAvg):
    """The clients tell how far they went; the server records it, and stops after some rounds."""

    metrics = ("moved",)

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(metrics={"moved": update.message["delta"].double().norm()})

    def server_update(self, server, mean, info):
        info.record("mean_moved", info.metrics["moved"] / len(info.cohort))
        if info.number == 1:
            info.stop("two rounds are enough")
        return super().server_update(server, mean, info)


@dataclass(frozen=True, kw_only=True)
class Groups(FedAvg):
    """Two models; each client downloads and trains that of its group, which changes with the rounds."""

    aggregator = GroupMeans(2)

    def init_server(self, model):
        return {"model": model, "models": torch.stack([model, 0.9 * model])}

    def download(self, server, client_id):
        return {"model": server["models"][client_id % 2], "number": server["models"].new_full((), client_id % 2)}

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(group=server["number"].long())

    def server_update(self, server, mean, info):
        models = server["models"] + (info.group_weights > 0)[:, None] * mean["delta"]
        return {"models": models, "model": models.mean(0)}


@dataclass(frozen=True, kw_only=True)
class Positions(FedAvg):
    """Each client sends a half of its changes by a mask, and the largest tenth of its mean by positions."""

    def init_server(self, model):
        return {"model": model, "counted": torch.zeros_like(model)}

    def client_update(self, server, client, local):
        x = server["model"]
        delta = local.train(x) - x
        half = (torch.arange(len(x), device=x.device) + local.client_id + local.round) % 2 == 0
        largest = delta.abs().topk(len(x) // 10).indices
        where = {"delta": half, "most": largest}
        return Update({"delta": delta, "most": delta[largest]}, local.num_examples, where=where)

    def server_update(self, server, mean, info):
        counted = server["counted"] + (info.covered["delta"] > 0) + (info.covered["most"] > 0)
        return {
            "model": server["model"] + mean["delta"] + 0.1 * mean["most"],
            "counted": counted.to(mean["delta"]),
        }


@dataclass(frozen=True, kw_only=True)
class Outgoing(Wrapper):
    """Adds noise to all that leaves a client and keeps what was added; the loss is withheld."""

    buffers_as_changes = True

    def init_client(self, model, layout):
        return super().init_client(model, layout) | {self.entry("added"): torch.zeros_like(model)}

    def outgoing(self, server, client, update, local):
        update = super().outgoing(server, client, update, local)
        added = {name: 1e-3 * local.normal(value) for name, value in update.message.items()}
        message = {name: value + added[name] for name, value in update.message.items()}
        kept = update.client | {self.entry("added"): client[self.entry("added")] + added["delta"]}
        metrics = {name: value for name, value in update.metrics.items() if name != "loss"}
        return update._replace(message=message, client=kept, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Past(FedAvg):
    """The server weighs by who trained when, and with which loss."""

    def init_server(self, model, federation):
        return {"model": model, "seen": model.new_zeros(federation.num_clients)}

    def server_update(self, server, mean, info):
        last = torch.from_numpy(info.federation.last_loss.copy()).nan_to_num(1.0).to(server["seen"])
        seen = server["seen"] + last * torch.from_numpy(info.federation.last_round + 2.0).to(last)
        return {"model": server["model"] + mean["delta"] / (1 + seen.mean()), "seen": seen}


PLAIN = Objective, AllRows, PublicExamples, Surveyed, Personalised, Numbers, Groups, Positions, Past
WORDS = {kind.__name__: {"name": f"words:{kind.__name__}"} for kind in PLAIN}  # as in a config
WORDS["Nested"] = {"name": "words:Outgoing", "inner": {"name": "words:Outgoing", "inner": "fedavg"}}
