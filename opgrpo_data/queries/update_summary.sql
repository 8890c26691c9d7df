-- What an iteration trained on, by role: one row per run, iteration and role (docs/metrics.md).
-- Later epochs repeat a trajectory: each counts once. A group without spread in its rewards is dead: it has no gradient.
SELECT
    run_id, iteration, role,
    count(*) AS trajectories,
    count(DISTINCT group_id) AS groups,
    count(DISTINCT group_id) FILTER (WHERE dead) / count(DISTINCT group_id) AS dead_groups,
    avg(reward) AS reward_mean,
    avg(age) AS age_mean,
    max(age) AS age_max,
    avg(importance_weight) AS weight_mean,
    min(importance_weight) AS weight_min,
    max(importance_weight) AS weight_max,
    avg(predicted_ess) AS predicted_ess,
    pow(sum(importance_weight), 2) / nullif(count(*) * sum(pow(importance_weight, 2)), 0) AS weight_ess,
    avg(len(train_steps)) AS steps_mean
FROM (
    SELECT
        *,
        bool_and(advantage = 0) OVER (PARTITION BY run_id, iteration, group_id) AS dead
    FROM {updates}
    QUALIFY row_number() OVER (PARTITION BY run_id, iteration, trajectory_id ORDER BY optimizer_step) = 1
)
GROUP BY ALL
ORDER BY ALL
