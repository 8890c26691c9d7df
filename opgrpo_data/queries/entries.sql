-- Everything the replay buffer may hold after one iteration, with its age and its decayed reward.
-- previous:   the buffer one iteration earlier        candidates: this iteration's scored trajectories
-- excluded:   ids of trajectories in quarantine, which are neither kept nor taken
-- Decay keeps the order of any two entries, so the best of (previous best, new) is the best of all history.
-- A negative reward decays away from zero: age must never make an entry look better.
-- fresh_mean, fresh_std: rewards of the fresh members of the prompt's latest group.
CREATE TABLE entries AS
WITH aged AS (
    SELECT
        * EXCLUDE (age, decayed_reward, fresh_mean, fresh_std),
        $iteration - born_iteration AS age,
        first_value(fresh_mean) OVER latest AS fresh_mean,
        first_value(fresh_std) OVER latest AS fresh_std
    FROM (SELECT *, 0 AS visited FROM previous UNION ALL BY NAME SELECT *, 1 AS visited FROM candidates)
    WHERE isfinite(reward) AND trajectory_id NOT IN (SELECT trajectory_id FROM excluded)
    WINDOW latest AS (PARTITION BY prompt_id ORDER BY visited DESC, born_iteration DESC, member_index, trajectory_id)
)
SELECT
    * EXCLUDE (visited),
    CASE $decay_form
        WHEN 'linear' THEN reward - $decay * age
        ELSE reward * pow($decay, CASE WHEN reward < 0 THEN -age ELSE age END)
    END AS decayed_reward
FROM aged
