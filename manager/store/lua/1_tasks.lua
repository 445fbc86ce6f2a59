-- Submission, claims, ends, cancellation.

-- The owner of the first of these ids that exists; nil where none does.
local function owner_of_any(p, args, first)
  local names = {}
  for i = first, #args, 6 do names[#names + 1] = p .. 't:' .. args[i] end
  if redis.call('EXISTS', unpack(names)) == 0 then return nil end
  for _, name in ipairs(names) do
    local owner = redis.call('HGET', name, 'tenant')
    if owner then return owner end
  end
end

-- tenant, active_max, shapes m, m × (shape, json), then tasks: (id, shape, score offset, max_attempts, function, spec) …
-- All or nothing. Ids that exist, and are the tenant's, were accepted by an earlier send of the same call; what exists is
-- never written again. They are fresh and random: that one belongs to another tenant is an error of the caller.
local function submit(keys, args)
  local p, tenant, active_max = keys[1], args[1], tonumber(args[2])
  local shapes, at = tonumber(args[3]), 4
  local first = at + shapes * 2
  local count = (#args - first + 1) / 6
  local owner = owner_of_any(p, args, first)
  if owner then return { owner == tenant and 'OK' or 'EXISTS' } end
  local active = tonumber(redis.call('HGET', p .. 'tn:' .. tenant, 'active') or '0')
  if active + count > active_max then return { 'QUOTA', active } end
  for i = at, first - 1, 2 do
    redis.call('HSETNX', p .. 'shapes', args[i], args[i + 1])
    redis.call('SADD', p .. 'active', args[i])
  end
  local now = now_ms()
  local last = redis.call('HINCRBY', p .. 'meta', 'sequence', count)
  local sequence = last - count
  local arrived = {}
  for i = first, #args, 6 do
    local id, shape = args[i], args[i + 1]
    sequence = sequence + 1
    local score = string.format('%.0f', tonumber(args[i + 2]) + sequence)
    redis.call('HSET', p .. 't:' .. id, 'state', 'QUEUED', 'tenant', tenant, 'shape', shape, 'score', score,
      'sequence', sequence, 'max_attempts', args[i + 3], 'function', args[i + 4], 'spec', args[i + 5],
      'attempt', 0, 'created', now, 'queued', now)
    redis.call('ZADD', p .. 'q:' .. shape, score, id)
    redis.call('ZADD', p .. 'tt:' .. tenant, sequence, id)
    redis.call('ZADD', p .. 'ta:' .. tenant, sequence, id)
    arrived[shape] = (arrived[shape] or 0) + 1
  end
  redis.call('HINCRBY', p .. 'tn:' .. tenant, 'active', count)
  redis.call('SADD', p .. 'tenants', tenant)
  redis.call('HINCRBY', p .. 'counts', 'QUEUED', count)
  for i = at, first - 1, 2 do work_arrived(p, args[i], arrived[args[i]] or 0) end
  return { 'OK' }
end

local function retry_delay_ms(failures, chance)
  return math.floor(chance * math.min(300, 2 * 2 ^ failures) * SECOND)
end

local function crash_error(payload, crashes)
  local ok, err = pcall(cjson.decode, payload)
  if not ok or type(err) ~= 'table' then err = {} end
  local what = type(err.message) == 'string' and err.message or 'the executor died'
  err.type = 'ExecutorCrashed'
  err.message = what .. '; ' .. crashes .. ' crashes that this task alone can have caused'
  return cjson.encode(err)
end

-- Commits one end. Returns the task's state after it, or '' for a repeat and for an attempt that was replaced.
local function finish(p, slot, node, flag, id, attempt, outcome, payload, age_ms, chance, now)
  local task = load_task(p, id)
  if not task or task.state ~= 'RUNNING' or task.slot ~= slot then
    redis.call('SREM', p .. 'run:' .. slot, id)
    return ''
  end
  -- The slot may have claimed the task anew since this end was first sent: that claim stays in its run set.
  if task.attempt ~= attempt then return '' end
  redis.call('SREM', p .. 'run:' .. slot, id)
  task.node = node
  if task.cancel == '1' then redis.call('SREM', p .. 'x:' .. slot, id) end
  local key = p .. 't:' .. id
  if age_ms ~= '' then
    task.started = string.format('%.0f', now - tonumber(age_ms))
    redis.call('HSET', key, 'started', task.started)
  end
  if outcome == 'S' then return finalise(p, id, task, 'SUCCEEDED', payload, '', now) end
  if task.cancel == '1' then return finalise(p, id, task, 'CANCELLED', '', '', now) end
  if outcome == 'F' then
    local failures = redis.call('HINCRBY', key, 'failures', 1)
    if failures >= tonumber(task.max_attempts) then return finalise(p, id, task, 'FAILED', '', payload, now) end
    redis.call('HSET', key, 'state', 'RETRY_WAIT', 'slot', '', 'error', payload)
    redis.call('ZADD', p .. 'due', now + retry_delay_ms(failures, tonumber(chance)), id)
    count_move(p, 'RUNNING', 'RETRY_WAIT')
    return 'RETRY_WAIT'
  end
  if outcome == 'X' then
    local crashes = redis.call('HINCRBY', key, 'crashes', 1)
    if crashes >= CRASHES_MAX then return finalise(p, id, task, 'FAILED', '', crash_error(payload, crashes), now) end
    redis.call('HSET', key, 'alone', '1', 'error', payload)
    return enqueue(p, id, task, now)
  end
  if outcome == 'A' then
    redis.call('HSET', key, 'alone', '1')
    return enqueue(p, id, task, now)
  end
  -- R: never started. L, and C that nobody asked for: a loss that blames nobody, and is not counted where the leader has
  -- pre-empted the slot.
  return give_back(p, id, task, outcome ~= 'R' and flag ~= 'preempt', now)
end

local function claim_reply(claims, id, attempt, alone, spec)
  claims[#claims + 1] = id
  claims[#claims + 1] = attempt
  claims[#claims + 1] = alone or ''
  claims[#claims + 1] = spec
end

-- Takes up to n tasks of the shape, in order, and says which score the first had. A task that must run alone comes alone.
local function claim(p, slot, node, shape, n, now)
  local claims, first = {}, nil
  local popped = redis.call('ZPOPMIN', p .. 'q:' .. shape, n)
  local enough = false
  for i = 1, #popped, 2 do
    local id = popped[i]
    local key = p .. 't:' .. id
    local task = redis.call('HMGET', key, 'state', 'alone', 'spec')
    local alone = task[2] == '1'
    enough = enough or (alone and #claims > 0)
    if enough then
      redis.call('ZADD', p .. 'q:' .. shape, popped[i + 1], id)
    elseif task[1] == 'QUEUED' then
      enough = alone
      local attempt = redis.call('HINCRBY', key, 'attempt', 1)
      redis.call('HSET', key, 'state', 'RUNNING', 'slot', slot, 'node', node, 'claimed', now)
      redis.call('SADD', p .. 'run:' .. slot, id)
      first = first or string.format('%.0f', tonumber(popped[i + 1]))
      claim_reply(claims, id, attempt, task[2], task[3])
    end
  end
  local taken = #claims / 4
  if taken > 0 then
    redis.call('HINCRBY', p .. 'counts', 'QUEUED', -taken)
    redis.call('HINCRBY', p .. 'counts', 'RUNNING', taken)
  end
  return claims, first
end

-- Claims of this slot that the agent does not hold: the reply that carried them was lost.
local function redeliver(p, slot)
  local claims = {}
  for _, id in ipairs(redis.call('SMEMBERS', p .. 'run:' .. slot)) do
    local task = redis.call('HMGET', p .. 't:' .. id, 'state', 'slot', 'attempt', 'alone', 'spec')
    if task[1] == 'RUNNING' and task[2] == slot then
      claim_reply(claims, id, tonumber(task[3]), task[4], task[5])
    else
      redis.call('SREM', p .. 'run:' .. slot, id)
    end
  end
  return claims
end

local function learn(p, shape, count, duration_ms)
  if count == 0 then return end
  local key = p .. 'sh:' .. shape
  local mean = duration_ms / count
  local old = redis.call('HGET', key, 'run_ms')
  -- The mean of a batch counts as one observation: shapes of short tasks must not forget faster than those of long ones.
  if old then mean = tonumber(old) * 0.8 + mean * 0.2 end
  redis.call('HSET', key, 'run_ms', string.format('%.3f', mean))
  redis.call('HINCRBY', key, 'ended', count)
end

-- The tenant of a slot, from its record or, the first time, from its shape; what it held before anybody counted is counted.
local function tenant_of(p, slot, shape, known, now)
  if known then return known end
  local tenant = cjson.decode(redis.call('HGET', p .. 'shapes', shape)).tenant
  redis.call('HSET', p .. 's:' .. slot, 'tenant', tenant)
  local held = redis.call('SCARD', p .. 'run:' .. slot)
  if held > 0 then
    redis.call('HINCRBY', p .. 'tn:' .. tenant, 'running', held)
    count_work(p, tenant, slot, size_of(p, slot, shape), now)
  end
  return tenant
end

-- How many tasks, of up to n, the slot may claim by its tenant's quota. `ended` of its tasks have ended in this call, `work`
-- is what is counted of it. 0: it waits until it is woken, and those that have waited for longer go first. A slot at work
-- goes on for as long as a turn takes, unless what waits elsewhere has the higher priority.
local function quota_allows(p, tenant, slot, shape, n, ended, work, now)
  local quota = quota_of(p, tenant)
  if not quota.bounded then return n end
  local size = size_of(p, slot, shape)
  quota.running = quota.running - ended
  if work.gpus then quota.gpus, quota.memory = quota.gpus - work.gpus, quota.memory - work.bytes end
  local head = redis.call('ZRANGE', p .. 'q:' .. shape, 0, 0, 'WITHSCORES')
  if not head[1] then return n end
  local rank = math.floor(tonumber(head[2]) / PRIORITY_STEP)
  local key = p .. 'qw:' .. tenant
  local ok = has_room(quota, size)
  if ok and not work.turn then
    local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    local before = first[1] and first[1] ~= slot and math.floor(tonumber(first[2]) / TURN_STEP) or NO_TURN
    local over = not work.gpus or now - work.since >= TURN_MS
    ok = before > rank or (before == rank and not over)
  end
  if ok then
    if quota.running_max == 0 then return n end
    return math.min(n, quota.running_max - quota.running)
  end
  -- Asked again, it keeps its place, unless what waits behind it is of a higher priority now.
  redis.call('ZADD', key, 'LT', string.format('%.0f', rank * TURN_STEP + now), slot)
  return 0
end

-- slot, incarnation, n, then ends: (id, attempt, outcome, payload, age_ms, duration_ms, chance) …
-- Commits all ends, then replies {word, commits, claims}: FENCED | CLOSE | DRAIN | PREEMPT | IDLE | WORK.
-- With n = 0 it only commits. The agent calls it when it holds no claim of the slot but those that it reports.
local function next_(keys, args)
  local p, slot, incarnation, n = keys[1], args[1], args[2], tonumber(args[3])
  local key = p .. 's:' .. slot
  local record = redis.call('HMGET', key, 'status', 'incarnation', 'shape', 'node', 'flag', 'served', 'served_max',
    'tenant', 'gpus', 'bytes', 'since', 'turn', 'idle')
  if record[1] ~= 'OPEN' or record[2] ~= incarnation then return { 'FENCED', {}, {} } end
  local shape, node, flag = record[3], record[4], record[5]
  local now = now_ms()
  local tenant = tenant_of(p, slot, shape, record[8], now)
  if not record[8] then
    for i, counted in ipairs(redis.call('HMGET', key, 'gpus', 'bytes', 'since')) do record[8 + i] = counted end
  end
  local commits, ended, ran, ran_ms, requeued = {}, 0, 0, 0, 0
  for i = 4, #args, 7 do
    local status = finish(p, slot, node, flag, args[i], args[i + 1], args[i + 2], args[i + 3], args[i + 4], args[i + 6], now)
    commits[#commits + 1] = status
    if status == 'QUEUED' then requeued = requeued + 1 end
    if status ~= '' then ended = ended + 1 end
    -- A repeat is neither served nor learned from again.
    if status ~= '' and args[i + 5] ~= '' then ran = ran + 1; ran_ms = ran_ms + tonumber(args[i + 5]) end
  end
  learn(p, shape, ran, ran_ms)
  local served = tonumber(record[6] or '0')
  if ran > 0 then served = redis.call('HINCRBY', key, 'served', ran) end
  -- The one way out: counts what the tenant has at work, and wakes who may go on instead.
  local function reply(word, claims, working)
    local taken = word == 'WORK' and working ~= 'again' and #claims / 4 or 0
    if taken ~= ended then redis.call('HINCRBY', p .. 'tn:' .. tenant, 'running', taken - ended) end
    if working and not record[9] then count_work(p, tenant, slot, size_of(p, slot, shape), now) end
    if record[9] and not working then count_work(p, tenant, slot, nil, now) end
    if record[12] and n > 0 then redis.call('HDEL', key, 'turn') end
    if taken < ended or (n > 0 and not working) then give_turns(p, tenant) end
    local left = requeued - taken -- what came back and is not taken here is work for others
    if left > 0 then work_arrived(p, shape, left) end
    return { word, commits, claims }
  end
  if n == 0 then return reply('OK', {}, redis.call('SCARD', p .. 'run:' .. slot) > 0) end
  local lost = redeliver(p, slot)
  if #lost > 0 then return reply('WORK', lost, 'again') end
  local served_max = tonumber(record[7] or '0')
  local word = (flag and flag ~= '') and string.upper(flag) or (served_max > 0 and served >= served_max) and 'CLOSE'
  if word then
    redis.call('SREM', p .. 'idle:' .. shape, slot) -- it will take nothing: nobody may wake it instead of another
    redis.call('ZREM', p .. 'qw:' .. tenant, slot)
    return reply(word, {})
  end
  if served_max > 0 then n = math.min(n, served_max - served) end
  local work = { gpus = tonumber(record[9] or ''), bytes = tonumber(record[10] or ''), since = tonumber(record[11] or ''),
    turn = record[12] }
  local allowed = quota_allows(p, tenant, slot, shape, n, ended, work, now)
  local claims, first = {}, nil
  if allowed > 0 then claims, first = claim(p, slot, node, shape, allowed, now) end
  if #claims == 0 then
    -- One that the quota keeps waiting is woken by that: work that comes has nothing of it.
    redis.call(allowed > 0 and 'SADD' or 'SREM', p .. 'idle:' .. shape, slot)
    if allowed > 0 or (record[13] or '') == '' then redis.call('HSET', key, 'idle', now) end
    if tonumber(redis.call('HGET', p .. 'leader', 'held') or '0') > 0 then ask_for_plan(p, shape) end
    return reply('IDLE', {})
  end
  redis.call('SREM', p .. 'idle:' .. shape, slot)
  if (record[13] or '') ~= '' then redis.call('ZREM', p .. 'qw:' .. tenant, slot) end
  redis.call('HSET', key, 'idle', '', 'score', first)
  return reply('WORK', claims, true)
end

-- A task that runs for much longer than its shape's tasks are known to is news: the shape's run time is unknown again, and
-- what waits behind it may need slots of its own.
local function surprise(p, shape, age_ms)
  local run_ms = redis.call('HGET', p .. 'sh:' .. shape, 'run_ms')
  if not run_ms or age_ms < 4 * tonumber(run_ms) then return end
  redis.call('HDEL', p .. 'sh:' .. shape, 'run_ms')
  redis.call('HSET', p .. 'sh:' .. shape, 'wake_at', '1')
  if redis.call('ZCARD', p .. 'q:' .. shape) > 0 then ask_for_plan(p, shape) end
end

-- slot, incarnation, then (id, attempt, age_ms) …: the executor has taken these.
local function started(keys, args)
  local p, slot = keys[1], args[1]
  local now = now_ms()
  local count = 0
  local shape = redis.call('HGET', p .. 's:' .. slot, 'shape')
  for i = 3, #args, 3 do
    local key = p .. 't:' .. args[i]
    local task = redis.call('HMGET', key, 'state', 'slot', 'attempt', 'started')
    if task[1] == 'RUNNING' and task[2] == slot and task[3] == args[i + 1] then
      if not task[4] or task[4] == '' then -- a repeat comes later, with the same age
        redis.call('HSET', key, 'started', string.format('%.0f', now - tonumber(args[i + 2])))
      end
      if shape then surprise(p, shape, tonumber(args[i + 2])) end
      count = count + 1
    end
  end
  return count
end

-- id, attempt, stdout, stderr, bytes dropped: what the attempt has written so far. Kept only while the attempt is the
-- newest, and only if it is not less than what is kept: a repeat may come after its successor.
local function keep_log(keys, args)
  local p, id = keys[1], args[1]
  if redis.call('HGET', p .. 't:' .. id, 'attempt') ~= args[2] then return 0 end
  local key = p .. 'l:' .. id
  local kept = redis.call('HMGET', key, 'attempt', 'dropped')
  if kept[1] == args[2] then
    local bytes = redis.call('HSTRLEN', key, 'stdout') + redis.call('HSTRLEN', key, 'stderr') + tonumber(kept[2])
    if #args[3] + #args[4] + tonumber(args[5]) < bytes then return 0 end
  end
  redis.call('HSET', key, 'attempt', args[2], 'stdout', args[3], 'stderr', args[4], 'dropped', args[5])
  return 1
end

-- id, tenant: CANCELLED at once where nothing runs; else its agent is told. Returns the state after, or nil.
local function cancel(keys, args)
  local p, id, tenant = keys[1], args[1], args[2]
  local task = load_task(p, id)
  if not task or (tenant ~= '' and task.tenant ~= tenant) then return nil end
  if not LIVE[task.state] then return task.state end
  if task.state == 'RUNNING' then
    redis.call('HSET', p .. 't:' .. id, 'cancel', '1')
    redis.call('SADD', p .. 'x:' .. task.slot, id)
    redis.call('PUBLISH', p .. 'wake:' .. task.node, 'cancel ' .. task.slot)
    return 'RUNNING'
  end
  redis.call('ZREM', p .. 'q:' .. task.shape, id)
  redis.call('ZREM', p .. 'due', id)
  finalise(p, id, task, 'CANCELLED', '', '', now_ms())
  return 'CANCELLED'
end

-- limit: moves tasks whose retry is due back to their queues; returns how many, and ms until the next one (or -1).
local function due(keys, args)
  local p, now = keys[1], now_ms()
  local ids = redis.call('ZRANGEBYSCORE', p .. 'due', '-inf', now, 'LIMIT', 0, tonumber(args[1]))
  for _, id in ipairs(ids) do
    redis.call('ZREM', p .. 'due', id)
    local task = load_task(p, id)
    if task and task.state == 'RETRY_WAIT' then
      enqueue(p, id, task, now)
      work_arrived(p, task.shape, 1)
    end
  end
  local following = redis.call('ZRANGE', p .. 'due', 0, 0, 'WITHSCORES')
  if #following == 0 then return { #ids, -1 } end
  return { #ids, math.max(0, math.floor(tonumber(following[2]) - now)) }
end

local AGE_MISSES_MAX = 8 -- tasks of one priority that are too young before the rest is taken to be so: they stand by age

-- The highest priority that waits in one of these shapes by itself, not by its age; as a rank, lower is higher.
local function highest_rank(p, args, first)
  local highest = NO_TURN
  for i = first, #args do
    local head = redis.call('ZRANGE', p .. 'q:' .. args[i], 0, 0, 'WITHSCORES')
    if head[1] and not redis.call('HGET', p .. 't:' .. head[1], 'rose') then
      highest = math.min(highest, math.floor(tonumber(head[2]) / PRIORITY_STEP))
    end
  end
  return highest
end

-- token, ms, limit, shapes …: each task that has waited for so long since it came, or since it rose last, rises by one
-- priority, among the others of that by its sequence; but not over the highest that waits in any of the shapes: where all
-- are alike, age is no reason to take more than one's share. At most so many; returns how many have risen.
local function age(keys, args)
  local p, ms, limit = keys[1], tonumber(args[2]), tonumber(args[3])
  if not leads(p, args[1]) then return -1 end
  local now, risen = now_ms(), 0
  local lower = string.format('%.0f', (highest_rank(p, args, 4) + 1) * PRIORITY_STEP)
  for i = 4, #args do
    local queue, from = p .. 'q:' .. args[i], lower
    while risen < limit do
      local first = redis.call('ZRANGEBYSCORE', queue, from, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if not first[1] then break end
      local rank = math.floor(tonumber(first[2]) / PRIORITY_STEP)
      from = string.format('%.0f', (rank + 1) * PRIORITY_STEP)
      local misses = 0
      for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, first[2], '(' .. from, 'LIMIT', 0, limit - risen)) do
        local task = redis.call('HMGET', p .. 't:' .. id, 'queued', 'rose', 'score')
        if now - math.max(tonumber(task[1]), tonumber(task[2] or '0')) >= ms then
          local score = string.format('%.0f', tonumber(task[3]) - PRIORITY_STEP)
          redis.call('HSET', p .. 't:' .. id, 'score', score, 'rose', now)
          redis.call('ZADD', queue, score, id)
          risen = risen + 1
        else
          misses = misses + 1
          if misses == AGE_MISSES_MAX then break end
        end
      end
    end
  end
  return risen
end

redis.register_function('ry_submit', submit) -- no allow-oom: a full store must refuse new work
redis.register_function { function_name = 'ry_next', callback = next_, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_started', callback = started, flags = { 'allow-oom' } }
redis.register_function('ry_log', keep_log)
redis.register_function { function_name = 'ry_cancel', callback = cancel, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_due', callback = due, flags = { 'allow-oom' } }
redis.register_function { function_name = 'ry_age', callback = age, flags = { 'allow-oom' } }
