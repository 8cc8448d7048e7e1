"""Five questions about a model's routing, answered from a warehouse: a notebook to start from.

`make notebook` opens it on the demo's warehouse; `marimo edit notebooks/demo.py` on `$MOEWH_WAREHOUSE`, else `./wh`. It
works for any warehouse whose prompts have domains. The answers follow the run, layer and prompt that you choose.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Five questions about routing")


@app.cell
def _():
    import os

    import marimo as mo

    import moewh

    wh = moewh.open(os.environ.get("MOEWH_WAREHOUSE", "wh"))
    return mo, moewh, wh


@app.cell
def _(mo):
    def table(relation):
        """Show a DuckDB relation as a sortable, searchable table, with ratios to three digits."""
        types = zip(relation.columns, relation.types, strict=True)
        ratios = {name: "{:.3f}".format for name, kind in types if str(kind) == "DOUBLE"}
        return mo.ui.table(relation.to_arrow_table(), selection=None, format_mapping=ratios)

    return (table,)


@app.cell
def _(mo, moewh, run, wh):
    def figure(draw, **selected):
        """Show a figure of the chosen run, or in words why it has none."""
        try:
            return draw(wh, run=run.value, **selected)
        except moewh.MoewhError as error:
            return mo.plain_text(str(error))

    return (figure,)


@app.cell
def _(mo, wh):
    runs = [run for (run,) in wh.sql("select run_id from runs where tokens > 0 order by created_at, run_id").fetchall()]
    mo.stop(not runs, mo.md("No run of this warehouse has tokens yet. `moewh demo` or `moewh ingest` makes one."))
    run = mo.ui.dropdown(runs, value=runs[-1], label="Run")
    mo.md(f"""
    # Five questions about routing

    Each answer is a `moewh` query, so you can also run it in a shell, from CI and in SQL. {run}
    """)
    return (run,)


@app.cell
def _(mo, run, wh):
    layers = [
        row[0] for row in wh.sql("select layer from layers where run_id = $run order by 1", run=run.value).fetchall()
    ]
    layer = mo.ui.dropdown([str(number) for number in layers], value=str(layers[len(layers) // 2]), label="MoE layer")
    return layer, layers


@app.cell
def _(mo, run, table, wh):
    preferred = wh.query("domain_experts", run=run.value, min_share=0.1)
    tokens_of = wh.sql(
        """
        with preferred as (
            select layer, expert, domain, lift, tokens from domain_specialization
            where run_id = $run and share >= 0.1
            qualify row_number() over (partition by domain order by lift desc) = 1
        )
        select preferred.domain, preferred.layer, preferred.expert, preferred.lift,
            list(affinity.token order by affinity.tokens desc)[:8] as most_frequent_tokens
        from preferred join expert_token_affinity as affinity
            on affinity.run_id = $run and affinity.layer = preferred.layer and affinity.expert = preferred.expert
        group by all order by preferred.lift desc
        """,
        run=run.value,
    )
    mo.vstack(
        [
            mo.md("""
            ## 1. Which experts specialise in what?

            `moewh query domain_experts`: experts that take a greater share of one domain than of all tokens. `lift` is
            the ratio of the two shares; 1 is no preference. Below is each domain's strongest expert, with the tokens
            that it gets most.
            """),
            table(preferred),
            table(tokens_of),
            mo.md("""
            Some expert always looks specialised. `moewh query specialization_shuffled` gives the lift that a random
            group of prompts would show.
            """),
        ]
    )
    return preferred, tokens_of


@app.cell
def _(figure, layer, mo, moewh, run, table, wh):
    pairs = wh.sql(
        """
        select expert_a, expert_b, tokens, conditional, lift from co_routing
        where run_id = $run and layer = $layer and expert_a < expert_b and tokens >= 20 order by lift desc limit 10
        """,
        run=run.value,
        layer=int(layer.value),
    )
    mo.vstack(
        [
            mo.md(f"""
            ## 2. Which experts fire together?

            The view `co_routing`: how many tokens choose both experts of a pair, relative to independent choices
            (`lift`). {layer}
            """),
            figure(moewh.plots.co_routing, layer=int(layer.value)),
            table(pairs),
        ]
    )
    return (pairs,)


@app.cell
def _(figure, layers, mo, moewh, run, table, wh):
    flow = wh.sql(
        """
        select layer, expert, next_layer, next_expert, tokens, conditional, lift from layer_transitions
        where run_id = $run and tokens >= 20 order by lift desc limit 10
        """,
        run=run.value,
    )
    mo.vstack(
        [
            mo.md("""
            ## 3. Where do tokens go from one layer to the next?

            The view `layer_transitions`: the share (`conditional`) of an expert's tokens that go to an expert of the
            next MoE layer. The map shows the first two layers.
            """),
            figure(moewh.plots.transitions, layer=layers[0]),
            table(flow),
        ]
    )
    return (flow,)


@app.cell
def _(figure, mo, moewh, run, table, wh):
    settled = wh.sql(
        """
        select train_step, layer, saturation, random from router_saturation
        where run_id in (select run_id from runs where series = (select series from runs where run_id = $run))
        order by layer, train_step
        """,
        run=run.value,
    )
    mo.vstack(
        [
            mo.md("""
            ## 4. When does routing settle in training?

            `moewh query saturation_over_training`: the share of the last checkpoint's experts that a checkpoint already
            chooses, over the same tokens; `random` is the share for two independent, even routers.
            """),
            figure(moewh.plots.saturation),
            table(settled),
        ]
    )
    return (settled,)


@app.cell
def _(mo, run, wh):
    last = wh.sql("select max(prompt_id) from prompts where run_id = $run", run=run.value).fetchall()[0][0]
    prompt = mo.ui.number(start=0, stop=last, value=min(3, last), label="Prompt")
    return (prompt,)


@app.cell
def _(figure, layer, mo, moewh, prompt, run):
    view = figure(moewh.plots.tokens, prompt_id=int(prompt.value), layer=int(layer.value))
    mo.vstack(
        [
            mo.md(f"""
            ## 5. Which experts does one prompt use?

            `moewh show --prompt {prompt.value} --layer {layer.value} --run {run.value}`: each token has the colour of
            the expert that it chose first; point at it to see the weights and the other experts. {prompt}
            """),
            view,
        ]
    )
    return (view,)


if __name__ == "__main__":
    app.run()
