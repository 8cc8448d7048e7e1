-- shuffled_shares: the experts' shares of each domain's choices, for the true domains and for random assignments.
-- One row per run, shuffle, layer, domain and expert, unused ones included (shuffled_domains; shuffle 0 is the truth).
-- Over tokens of kind prompt and generated: choices of the domain at the layer, N_iD of them of the expert:
--   share = N_iD / choices; over experts it sums to 1
-- Parameters:
--   shuffles (count): default 20.
--   run (run): default every run.
--   layer (layer): default every layer.
create or replace view shuffled_shares as
with chosen as (
    select
        shuffled_domains.run_id as run_id,
        shuffled_domains.shuffle as shuffle,
        shuffled_domains.domain as domain,
        prompt_choices.layer as layer,
        prompt_choices.expert as expert,
        sum(prompt_choices.tokens)::double as tokens
    from shuffled_domains
    join prompt_choices
        on prompt_choices.run_id = shuffled_domains.run_id
        and prompt_choices.prompt_id = shuffled_domains.prompt_id
    group by
        shuffled_domains.run_id,
        shuffled_domains.shuffle,
        shuffled_domains.domain,
        prompt_choices.layer,
        prompt_choices.expert
),
totals as (
    select
        run_id,
        shuffle,
        domain,
        layer,
        sum(tokens) as choices
    from chosen
    group by
        run_id,
        shuffle,
        domain,
        layer
)
select
    totals.run_id as run_id,
    totals.shuffle as shuffle,
    totals.layer as layer,
    totals.domain as domain,
    experts.expert as expert,
    totals.choices as choices,
    coalesce(chosen.tokens, 0) / totals.choices as share
from totals
join experts
    on experts.run_id = totals.run_id
    and experts.layer = totals.layer
left join chosen
    on chosen.run_id = totals.run_id
    and chosen.shuffle = totals.shuffle
    and chosen.domain is not distinct from totals.domain
    and chosen.layer = totals.layer
    and chosen.expert = experts.expert;

comment on view shuffled_shares is 'Staging. One row per shuffle, layer, domain and expert: its share of the domain''s choices.';
comment on column shuffled_shares.run_id is 'The run these rows belong to.';
comment on column shuffled_shares.shuffle is '0: the true domains; 1, 2, ...: domains assigned at random.';
comment on column shuffled_shares.layer is 'Layer index in the model.';
comment on column shuffled_shares.domain is 'The domain assigned to the prompts; NULL counts as a domain.';
comment on column shuffled_shares.expert is '0-based expert index within the layer.';
comment on column shuffled_shares.choices is 'Choices of the domain''s tokens at the layer.';
comment on column shuffled_shares.share is 'This expert''s share of them.';
