-- router_confidence: how sure the router is of a token's experts.
-- One row per run, token and MoE layer with raw logits (runs ingested with --router-logits). Tokens of every kind,
-- specials included: filter on kind. E experts, top-k = k, z_i the raw logit, s_i the score by layers.scoring:
--   softmax: s_i = exp(z_i) / sum of exp(z)     sigmoid: s_i = 1 / (1 + exp(-z_i))
--   entropy    = - sum of p_i log2 p_i with p_i = s_i / sum of s, in bits: 0 if one expert gets all, at most log2 E
--   top_k_mass = sum of the k largest p_i
--   margin     = k-th minus (k + 1)-th largest of s_i + b_i, where b_i is the expert's selection bias, if any
--                (experts.selection_bias): how far the next expert is from being chosen; NULL if k = E
-- All three are NULL if the scoring is another or unknown. A family that first chooses among groups of experts
-- (DeepSeek-V3) may skip an expert with a higher score. An even router has entropy log2 E and mass k / E.
-- Reads the opt-in table router_logits, E values per row: filter on run_id, layer or token_id.
create or replace view router_confidence as
with scored as (
    select
        router_logits.run_id as run_id,
        router_logits.segment as segment,
        router_logits.token_id as token_id,
        router_logits.layer as layer,
        layers.top_k as top_k,
        layers.num_experts as num_experts,
        layers.scoring as scoring,
        experts.selection_bias as selection_bias,
        list_extract(router_logits.logits, experts.expert + 1)::double as logit
    from router_logits
    join layers
        on layers.run_id = router_logits.run_id
        and layers.layer = router_logits.layer
    join experts
        on experts.run_id = router_logits.run_id
        and experts.layer = router_logits.layer
),
stable as (
    select
        run_id,
        segment,
        token_id,
        layer,
        top_k,
        num_experts,
        scoring,
        selection_bias,
        logit,
        max(logit) over (partition by run_id, segment, token_id, layer) as max_logit
    from scored
),
scores as (
    select
        run_id,
        segment,
        token_id,
        layer,
        top_k,
        num_experts,
        scoring,
        selection_bias,
        case scoring
            when 'softmax' then exp(logit - max_logit)
            when 'sigmoid' then 1 / (1 + exp(-logit))
        end as score
    from stable
),
shares as (
    select
        run_id,
        segment,
        token_id,
        layer,
        top_k,
        num_experts,
        scoring,
        selection_bias,
        score,
        score / nullif(sum(score) over (partition by run_id, segment, token_id, layer), 0) as share
    from scores
),
selections as (
    select
        run_id,
        segment,
        token_id,
        layer,
        top_k,
        num_experts,
        share,
        case scoring when 'softmax' then share when 'sigmoid' then score end + selection_bias as selection
    from shares
),
places as (
    select
        run_id,
        segment,
        token_id,
        layer,
        top_k,
        num_experts,
        share,
        selection,
        row_number() over (partition by run_id, segment, token_id, layer order by share desc nulls last) as share_place,
        row_number() over (partition by run_id, segment, token_id, layer order by selection desc nulls last) as place
    from selections
)
select
    run_id,
    segment,
    token_id,
    layer,
    sum(share * log2(1 / nullif(share, 0))) as entropy,
    sum(case when share_place <= top_k then share end) as top_k_mass,
    case
        when top_k < num_experts then
            sum(case when place = top_k then selection end) - sum(case when place = top_k + 1 then selection end)
    end as margin
from places
group by
    run_id,
    segment,
    token_id,
    layer,
    top_k,
    num_experts;

comment on view router_confidence is 'One row per token and layer with raw logits: entropy, mass of the chosen experts, margin to the next expert.';
comment on column router_confidence.run_id is 'The run these rows belong to.';
comment on column router_confidence.segment is 'The committed unit of work these rows came in (from the path).';
comment on column router_confidence.token_id is 'prompt_id * 2^24 + position: the token''s id within its run.';
comment on column router_confidence.layer is 'Layer index in the model.';
comment on column router_confidence.entropy is 'Entropy in bits of the router''s normalized scores: 0 if one expert gets all, log2 E if they are even.';
comment on column router_confidence.top_k_mass is 'Sum of the k largest normalized scores.';
comment on column router_confidence.margin is 'k-th minus (k + 1)-th largest score, including the selection bias: how close the next expert is; NULL if k = E.';
