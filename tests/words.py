"""Tiny strategies that use the words of the interface, one or a few each."""

from dataclasses import dataclass

from fedsim import Rows, Update
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


WORDS = [Objective, AllRows, PublicExamples, Surveyed, Personalised]
