-- transition_sums: a token goes from each of its k experts to each of its k' next ones, and from one first choice to
-- one, so the sum of conditional over all next experts is k'. All pairs and first choices are counted separately; this
-- check compares them. If ranks are not known, the number of pairs must be a multiple of k * k'. No expert passes on
-- more tokens than it has.
-- One row per run and layer where the pairs are not k * k' times the first choices, or an expert passes on too many.
-- Parameters:
--   run (run): default every run.
with sent as (
    select
        run_id,
        layer,
        next_layer,
        expert,
        sum(tokens)::bigint as pairs
    from layer_transitions
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        layer,
        next_layer,
        expert
),
sent_of as (
    select
        sent.run_id as run_id,
        sent.layer as layer,
        sum(sent.pairs)::bigint as pairs,
        max(layer_steps.top_k * layer_steps.next_top_k) as pairs_per_token,
        count(expert_load.first_choice_tokens) as experts_ranked,
        sum(case when sent.pairs > expert_load.tokens * layer_steps.next_top_k then 1 else 0 end)::bigint as experts_over
    from sent
    join layer_steps
        on layer_steps.run_id = sent.run_id
        and layer_steps.layer = sent.layer
    join expert_load
        on expert_load.run_id = sent.run_id
        and expert_load.layer = sent.layer
        and expert_load.expert = sent.expert
    group by
        sent.run_id,
        sent.layer
),
firsts as (
    select
        run_id,
        layer,
        sum(tokens)::bigint as tokens
    from first_choice_transitions
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by
        run_id,
        layer
)
select
    sent_of.run_id as run_id,
    sent_of.layer as layer,
    sent_of.pairs as pairs,
    case when sent_of.experts_ranked > 0 then coalesce(firsts.tokens, 0) * sent_of.pairs_per_token end as expected,
    sent_of.experts_over as experts_over
from sent_of
left join firsts
    on firsts.run_id = sent_of.run_id
    and firsts.layer = sent_of.layer
where (sent_of.experts_ranked > 0 and sent_of.pairs <> coalesce(firsts.tokens, 0) * sent_of.pairs_per_token)
    or sent_of.pairs % sent_of.pairs_per_token <> 0
    or sent_of.experts_over > 0
order by run_id, layer
