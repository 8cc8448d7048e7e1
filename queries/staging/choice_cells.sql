-- choice_cells: how many choices of each expert each token of the vocabulary, domain and position has.
-- One row per run, layer, about, choice, part and expert with at least one. about: token, domain or position (1, 2 to 3,
-- 4 to 7, ... counted from 1). choice: any (all k of a token) or first (rank 0; no rows if ranks are not known).
-- Tokens of kind prompt and generated; about = token leaves out those whose vocabulary entry is not known.
-- Counts come from rollups, except first choices by token, and positions, which are read from the rows.
create or replace view choice_cells as
select
    affinity_counts.run_id as run_id,
    affinity_counts.layer as layer,
    'token' as about,
    'any' as choice,
    affinity_counts.vocab_id::varchar as part,
    affinity_counts.expert as expert,
    sum(affinity_counts.tokens)::bigint as tokens
from affinity_counts
where affinity_counts.kind <> 'special'
    and affinity_counts.vocab_id is not null
group by
    affinity_counts.run_id,
    affinity_counts.layer,
    affinity_counts.vocab_id,
    affinity_counts.expert
union all
select
    expert_counts.run_id as run_id,
    expert_counts.layer as layer,
    'domain' as about,
    'any' as choice,
    case when expert_counts.domain is null then '' else '=' || expert_counts.domain end as part,
    expert_counts.expert as expert,
    sum(expert_counts.tokens)::bigint as tokens
from expert_counts
where expert_counts.kind <> 'special'
group by
    expert_counts.run_id,
    expert_counts.layer,
    expert_counts.domain,
    expert_counts.expert
union all
select
    expert_counts.run_id as run_id,
    expert_counts.layer as layer,
    'domain' as about,
    'first' as choice,
    case when expert_counts.domain is null then '' else '=' || expert_counts.domain end as part,
    expert_counts.expert as expert,
    sum(expert_counts.first_choice_tokens)::bigint as tokens
from expert_counts
where expert_counts.kind <> 'special'
    and expert_counts.first_choice_tokens > 0
group by
    expert_counts.run_id,
    expert_counts.layer,
    expert_counts.domain,
    expert_counts.expert
union all
select
    routing.run_id as run_id,
    routing.layer as layer,
    'token' as about,
    'first' as choice,
    routing.vocab_id::varchar as part,
    routing.expert as expert,
    count(*)::bigint as tokens
from routing
where routing.kind <> 'special'
    and routing.rank = 0
    and routing.vocab_id is not null
group by
    routing.run_id,
    routing.layer,
    routing.vocab_id,
    routing.expert
union all
select
    routing.run_id as run_id,
    routing.layer as layer,
    'position' as about,
    'any' as choice,
    floor(log2(routing.token_id % 16777216 + 1.5::double))::bigint::varchar as part,
    routing.expert as expert,
    count(*)::bigint as tokens
from routing
where routing.kind <> 'special'
group by
    routing.run_id,
    routing.layer,
    floor(log2(routing.token_id % 16777216 + 1.5::double))::bigint::varchar,
    routing.expert
union all
select
    routing.run_id as run_id,
    routing.layer as layer,
    'position' as about,
    'first' as choice,
    floor(log2(routing.token_id % 16777216 + 1.5::double))::bigint::varchar as part,
    routing.expert as expert,
    count(*)::bigint as tokens
from routing
where routing.kind <> 'special'
    and routing.rank = 0
group by
    routing.run_id,
    routing.layer,
    floor(log2(routing.token_id % 16777216 + 1.5::double))::bigint::varchar,
    routing.expert;

comment on view choice_cells is 'Staging. One row per expert and token of the vocabulary, domain or position: its number of choices.';
comment on column choice_cells.run_id is 'The run these rows belong to.';
comment on column choice_cells.layer is 'Layer index in the model.';
comment on column choice_cells.about is 'token, domain or position.';
comment on column choice_cells.choice is 'any: all k choices of a token; first: rank 0.';
comment on column choice_cells.part is 'The token of the vocabulary, the domain or the range of positions.';
comment on column choice_cells.expert is '0-based expert index within the layer.';
comment on column choice_cells.tokens is 'Choices of the expert in this part.';
