"""Commands for federations of nodes on other machines, over Flower."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.interrupts import raise_on_interrupt
from fedsim.cli.runs import execute_and_show
from fedsim.cli.shared import AsJson, ConfigPath, NewFolder, Settings, console, print_json
from fedsim.errors import ConfigError


def serve(
    config: ConfigPath,
    settings: Settings = None,
    superlink: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Flower's SuperLink")] = None,
    ca: Annotated[Path | None, typer.Option(help="the certificate of the SuperLink's authority")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP, without a certificate")] = False,
    nodes: Annotated[
        str | None, typer.Option(metavar="N | A,B,C", help="how many nodes, or the names of those that take part")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="a folder of NAME.pub: a name belongs to the owner of its key")
    ] = None,
    out: NewFolder = None,
) -> None:
    """Train a federation of nodes on other machines, over Flower; `fedsim resume` goes on with it."""
    from fedsim.experiment.config import load, parse_overrides
    from fedsim.experiment.start import new_run
    from fedsim.flower.options import on_nodes

    chosen = on_nodes(config, superlink=superlink, ca=ca, insecure=insecure, nodes=nodes, keys=keys)
    loaded = load(config, chosen | parse_overrides(settings or []))
    raise_on_interrupt()
    execute_and_show(new_run(loaded, out, config.stem))


def node(
    settings: Annotated[Path, typer.Argument(metavar="NODE.yaml", help="the node's name, data and so on")],
    superlink: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Flower's SuperLink")] = None,
    ca: Annotated[Path | None, typer.Option(help="the certificate of the SuperLink's authority")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP, without a certificate")] = False,
    key: Annotated[Path | None, typer.Option(help="the node's private key, if the SuperLink asks for one")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="only load the data, and show what the node would offer; needs no server"),
    ] = False,
    runs: Annotated[bool, typer.Option("--runs", help="only list the runs that the node keeps")] = False,
    forget: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="only delete a run that the node keeps: its id or the beginning"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take part in a federation as a client, with the data of this machine, until interrupted."""
    from fedsim.flower.options import checked_node, forgotten, kept, work

    if as_json and not (runs or check):
        raise ConfigError("--json: goes with --runs or --check")
    if check and (runs or forget is not None):
        raise ConfigError("--check: goes without --runs and --forget")
    raise_on_interrupt()
    given = {"superlink": superlink, "ca": ca, "insecure": insecure or None, "key": key}
    if check:
        offer = checked_node(settings, **given)
        if as_json:
            print_json(offer._asdict())
        else:
            from fedsim.flower.offer import offer_table

            console.print(offer_table(offer))
        return
    if forget is not None:
        console.out(forgotten(settings, forget), highlight=False)
    if runs:
        found, max_disk = kept(settings)
        if as_json:
            print_json({"max_disk": max_disk, "runs": [run.shown() for run in found]})
        else:
            from fedsim.flower.kept_runs import kept_table

            console.print(kept_table(found, max_disk))
    if runs or forget is not None:
        return
    work(settings, **given)


def nodes(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="a run's folder: for its SuperLink, and what its nodes have reported"),
    ] = None,
    superlink: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Flower's SuperLink; 127.0.0.1:8000 or RUN's if not given"),
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="the certificate of the SuperLink's authority")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain HTTP, without a certificate")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the nodes of a federation: their names, when they were last seen, and how much data they reported."""
    from fedsim.flower.options import shown_nodes

    raise_on_interrupt()
    address, found = shown_nodes(folder, superlink, ca, insecure)
    if as_json:
        print_json({"superlink": address, "nodes": [node._asdict() for node in found]})
    else:
        from fedsim.flower.node_list import nodes_table

        console.print(nodes_table(found))


def flower_app(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="a new folder for it")],
    settings: Settings = None,
) -> None:
    """Write an experiment as a Flower app, for `flwr run` and Flower's own SuperNodes."""
    from fedsim.base.reading import read_yaml
    from fedsim.experiment.config import overridden, parse_overrides
    from fedsim.flower.app import checked, write_app
    from fedsim.flower.options import on_nodes

    chosen = on_nodes(config, superlink=None, ca=None, insecure=False, nodes=None, keys=None)
    values = overridden(read_yaml(config), chosen | parse_overrides(settings or []))
    checked(values)
    raise_on_interrupt()
    console.out(f"app: {write_app(out, config.stem, values)}", highlight=False)
    console.out(f"run: flwr run {out} SUPERLINK --stream", highlight=False)
    console.out("how it ended: flwr ls SUPERLINK --format json", highlight=False)


def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new folder, or an earlier one to add nodes to")],
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="a name or address that nodes know the server by; may be given again"),
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a node that gets a pair of keys; may be given again")
    ] = None,
    days: Annotated[int, typer.Option(help="for which the server's certificate is valid")] = 825,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="a new certificate of the server, by the CA in DIR, for the same key"),
    ] = False,
) -> None:
    """Make what a federation over Flower needs: a CA, the server's certificate, and a key for each node."""
    from fedsim.flower.certificates import make

    raise_on_interrupt()
    for made in make(folder, server or [], node or [], days, renew):
        console.out(f"{made.path}: {made.place}", highlight=False)
