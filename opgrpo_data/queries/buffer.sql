-- The replay buffer after one iteration: at most one entry per prompt, the highest decayed reward.
-- previous:   the buffer one iteration earlier        candidates: this iteration's scored trajectories
-- excluded:   ids of trajectories in quarantine, which are neither kept nor taken
-- Decay keeps the order of any two entries, so the best of (previous best, new) is the best of all history.
-- Of equals the newer stays: a reward of 0 does not decay, and a failure must not be kept for being the first.
-- A negative reward decays away from zero: age must never make an entry look better.
WITH aged AS (
    SELECT * EXCLUDE (age, decayed_reward), $iteration - born_iteration AS age
    FROM (SELECT * FROM previous UNION ALL BY NAME SELECT * FROM candidates)
    WHERE isfinite(reward) AND trajectory_id NOT IN (SELECT trajectory_id FROM excluded)
),
decayed AS (
    SELECT
        *,
        CASE $decay_form
            WHEN 'linear' THEN reward - $decay * age
            ELSE reward * pow($decay, CASE WHEN reward < 0 THEN -age ELSE age END)
        END AS decayed_reward
    FROM aged
)
SELECT *
FROM decayed
QUALIFY row_number() OVER (PARTITION BY prompt_id ORDER BY decayed_reward DESC, born_iteration DESC, trajectory_id) = 1
ORDER BY prompt_id
