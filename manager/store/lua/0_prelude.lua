-- Names, time and the steps that several functions share. The only key passed in is the prefix; every name is built from
-- it as manager/core/keys.py says. All functions are idempotent on (task, attempt) or on the id that they are given,
-- since a client library may send a call twice.

local SECOND = 1000
local INLINE_EVENT_BYTES = 4096 -- larger results are read from the record by whoever wants them
local EVENTS_MAX = 20000        -- a reader that is further behind looks at state instead
local CRASHES_MAX = 3
local LOSSES_MAX = 50
local PRIORITY_STEP = 2 ^ 44    -- between the scores of two priorities, as manager/core/model.py has it
local TURN_MS = SECOND          -- a slot gives way at a task boundary to those that its tenant's quota keeps waiting
local TURN_STEP = 2 ^ 42        -- between two priorities of slots that wait for the quota; times stay below it
local NO_TURN = 31              -- stands behind all priorities: what the slot leases is over the quota by itself
local TURNS_MAX = 64            -- slots that are looked at when a tenant's use sinks; a beat reaches the others
local TRIES_MAX = 50            -- attempts that a record tells of, the newest
local TRY_MESSAGE_BYTES = 500   -- of what such an attempt's error said
local TOLD_MAX = 200            -- tasks that are told of the end of those they wait for, in one call
local DEADLINE = 'deadline'     -- the mark of a cancellation that nobody asked for: time is up
local LIVE = { QUEUED = true, RUNNING = true, RETRY_WAIT = true, BLOCKED = true }

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * SECOND + math.floor(tonumber(time[2]) / SECOND)
end

-- Tells the controller that a round is worth while, at most once between two of its looks at the shape.
local function ask_for_plan(p, shape)
  local key = p .. 'sh:' .. shape
  if redis.call('HGET', key, 'asked') == '1' then return end
  redis.call('HSET', key, 'asked', '1')
  redis.call('PUBLISH', p .. 'ctl', 'plan')
end

-- Wakes up to `count` idle slots of the shape; returns how many there were.
local function wake(p, shape, count)
  local slots = redis.call('SPOP', p .. 'idle:' .. shape, count)
  for _, slot in ipairs(slots) do
    local node = redis.call('HGET', p .. 's:' .. slot, 'node')
    if node then redis.call('PUBLISH', p .. 'wake:' .. node, 'work ' .. slot) end
  end
  return #slots
end

-- Work of the shape has come (or come back): somebody must know. Fewer idle slots than tasks: the controller as well.
local function work_arrived(p, shape, count)
  if wake(p, shape, count) >= count then return end
  local wake_at = tonumber(redis.call('HGET', p .. 'sh:' .. shape, 'wake_at') or '0')
  if redis.call('ZCARD', p .. 'q:' .. shape) >= wake_at then ask_for_plan(p, shape) end
end

local function count_move(p, from, to)
  if from then redis.call('HINCRBY', p .. 'counts', from, -1) end
  if to then redis.call('HINCRBY', p .. 'counts', to, 1) end
end

-- Whether an end in this process's time may have others to be told of: it spares most calls a question. Who does not know
-- tells them a round of the controller later.
local told_to_come = false

local ENDED_AS = { SUCCEEDED = 'succeeded', FAILED = 'failed', CANCELLED = 'cancelled' }

-- One task of an array has ended. The last one is the array's own end.
local function end_in_array(p, array, state)
  local key = p .. 'a:' .. array
  redis.call('HINCRBY', key, ENDED_AS[state], 1)
  if redis.call('HINCRBY', key, 'left', -1) == 0 and redis.call('EXISTS', p .. 'ch:' .. array) == 1 then
    redis.call('SADD', p .. 'rel', array)
    told_to_come = true
  end
end

-- The one way into a final state: record, indexes, counters and event together. `file`: where a large result lies.
local function finalise(p, id, task, state, result, err, now, file)
  -- The error of an earlier attempt goes: record and event must tell the same.
  local values = { 'state', state, 'finished', now, 'slot', '', 'cancel', '', 'started', task.started, 'error', err }
  if result ~= '' then values[#values + 1] = 'result'; values[#values + 1] = result end
  if file and file ~= '' then values[#values + 1] = 'file'; values[#values + 1] = file end
  redis.call('HSET', p .. 't:' .. id, unpack(values))
  redis.call('ZREM', p .. 'ta:' .. task.tenant, id)
  redis.call('ZADD', p .. 'dn:' .. task.tenant, now, id)
  redis.call('SADD', p .. 'dt', task.tenant)
  redis.call('HINCRBY', p .. 'tn:' .. task.tenant, 'active', -1)
  count_move(p, task.state, state)
  if task.start_by ~= '' or task.end_by ~= '' then redis.call('ZREM', p .. 'exp', id) end
  if task.array ~= '' then end_in_array(p, task.array, state) end
  if redis.call('EXISTS', p .. 'ch:' .. id) == 1 then
    redis.call('SADD', p .. 'rel', id)
    told_to_come = true
  end
  local event = { 'i', id, 's', state, 'a', task.attempt, 'f', now, 'b', task.started, 'n', task.node }
  if #result + #err <= INLINE_EVENT_BYTES and (not file or file == '') then
    event[#event + 1] = 'r'; event[#event + 1] = result
    event[#event + 1] = 'e'; event[#event + 1] = err
  end
  redis.call('XADD', p .. 'events', 'MAXLEN', '~', EVENTS_MAX, '*', unpack(event))
  return state
end

-- Back into the queue, at its old place. What its last attempt has reported of itself goes, but not its checkpoint.
local function enqueue(p, id, task, now)
  redis.call('HSET', p .. 't:' .. id, 'state', 'QUEUED', 'queued', now, 'slot', '', 'started', '')
  if task.state == 'RUNNING' then redis.call('HDEL', p .. 't:' .. id, 'progress', 'message') end
  redis.call('ZADD', p .. 'q:' .. task.shape, task.score, id)
  redis.call('SADD', p .. 'active', task.shape)
  if task.oom == '1' then redis.call('HSET', p .. 'sh:' .. task.shape, 'oom', '1') end
  count_move(p, task.state, 'QUEUED')
  return 'QUEUED'
end

local TASK_FIELDS = { 'state', 'attempt', 'slot', 'tenant', 'shape', 'score', 'max_attempts', 'cancel', 'started', 'node',
  'claimed', 'start_by', 'end_by', 'array', 'run', 'oom' }

local function load_task(p, id)
  local values = redis.call('HMGET', p .. 't:' .. id, unpack(TASK_FIELDS))
  if not values[1] then return nil end
  local task = {}
  for i, field in ipairs(TASK_FIELDS) do task[field] = values[i] or '' end
  return task
end

local function infrastructure_error(losses)
  return cjson.encode({ type = 'InfrastructureLost',
    message = 'the task lost its executor, agent or node ' .. losses .. ' times; it was not at fault, but is not tried again' })
end

-- The beginning of a text, of whole characters.
local function cut(text, bytes)
  if #text <= bytes then return text end
  return (string.gsub(string.sub(text, 1, bytes), '[\192-\255][\128-\191]*$', ''))
end

-- An attempt has ended, and its task goes on: the record keeps where it was, when, and why it ended.
local function note_try(p, id, task, why, message, now)
  local key, attempt = p .. 't:' .. id, tonumber(task.attempt)
  redis.call('HSET', key, 'try:' .. attempt, cjson.encode({ node = task.node, slot = task.slot,
    claimed_ms = tonumber(task.claimed) or 0, started_ms = tonumber(task.started) or 0, ended_ms = now, why = why,
    message = cut(message, TRY_MESSAGE_BYTES) }))
  if attempt > TRIES_MAX then redis.call('HDEL', key, 'try:' .. (attempt - TRIES_MAX)) end
end

local function start_error()
  return cjson.encode({ type = 'StartTimeout', message = 'no executor had taken the task within its start_timeout' })
end

local function deadline_error(what)
  return cjson.encode({ type = 'DeadlineExceeded', message = what .. ' when its time was up (total_timeout or deadline)' })
end

-- A task whose end was asked for has ended, or need not begin: by whom it was asked says as what.
local function end_as_asked(p, id, task, now)
  if task.cancel == DEADLINE then
    return finalise(p, id, task, 'FAILED', '', deadline_error('the task was running, and was ended,'), now)
  end
  return finalise(p, id, task, 'CANCELLED', '', '', now)
end

-- An attempt ends without having been at fault: requeue, with a cap, or cancel where that was asked.
local function give_back(p, id, task, counted, why, now)
  if task.cancel ~= '' then return end_as_asked(p, id, task, now) end
  if counted then
    local losses = redis.call('HINCRBY', p .. 't:' .. id, 'losses', 1)
    if losses >= LOSSES_MAX then return finalise(p, id, task, 'FAILED', '', infrastructure_error(losses), now) end
  end
  note_try(p, id, task, why, '', now)
  return enqueue(p, id, task, now)
end

-- What a tenant has at work, and may have; a limit that is not there, or 0, is none.
local function quota_of(p, tenant)
  local said = redis.call('HMGET', p .. 'tn:' .. tenant, 'running', 'gpus', 'memory', 'running_max', 'gpus_max', 'memory_max')
  local function number(at) return tonumber(said[at] or '0') end
  local quota = { running = number(1), gpus = number(2), memory = number(3) }
  quota.running_max, quota.gpus_max, quota.memory_max = number(4), number(5), number(6)
  quota.bounded = quota.running_max + quota.gpus_max + quota.memory_max > 0
  return quota
end

-- What the slot leases: devices, and memory on all of them together.
local function size_of(p, slot, shape)
  local said = redis.call('HMGET', p .. 's:' .. slot, 'devices', 'memory')
  local devices = said[1] or ''
  local gpus = devices == '' and 0 or select(2, string.gsub(devices, ',', '')) + 1
  local memory = tonumber(said[2] or '') or cjson.decode(redis.call('HGET', p .. 'shapes', shape)).memory_bytes
  return { gpus = gpus, memory = gpus * memory }
end

local function within(most, value) return most == 0 or value <= most end

-- Whether a slot of this size may claim beside what else the tenant has at work.
local function has_room(quota, size)
  return within(quota.running_max, quota.running + 1) and within(quota.gpus_max, quota.gpus + size.gpus)
    and within(quota.memory_max, quota.memory + size.memory)
end

-- Counts what a slot leases as at work, or (with no size) as at work no more. Its record says what was counted.
local function count_work(p, tenant, slot, size, now)
  local key = p .. 's:' .. slot
  local gpus, memory
  if size then
    gpus, memory = size.gpus, size.memory
    redis.call('HSET', key, 'gpus', gpus, 'bytes', string.format('%.0f', memory), 'since', now)
  else
    local said = redis.call('HMGET', key, 'gpus', 'bytes')
    gpus, memory = 0 - tonumber(said[1]), 0 - tonumber(said[2]) -- of 0, -x would be written as -0
    redis.call('HDEL', key, 'gpus', 'bytes', 'since')
  end
  redis.call('HINCRBY', p .. 'tn:' .. tenant, 'gpus', gpus)
  redis.call('HINCRBY', p .. 'tn:' .. tenant, 'memory', string.format('%.0f', memory))
end

-- A tenant's use has sunk, or may be more: the slots that its quota keeps waiting get their turn, by the priority of what
-- waits behind them and then by how long they have waited. The first that does not fit is not passed by those behind it.
local function give_turns(p, tenant)
  local key = p .. 'qw:' .. tenant
  local waiting = redis.call('ZRANGE', key, 0, TURNS_MAX - 1, 'WITHSCORES')
  if #waiting == 0 then return end
  local quota = quota_of(p, tenant)
  for i = 1, #waiting, 2 do
    local slot = waiting[i]
    local record = redis.call('HMGET', p .. 's:' .. slot, 'status', 'flag', 'shape', 'node')
    if record[1] ~= 'OPEN' or (record[2] or '') ~= '' then
      redis.call('ZREM', key, slot)
    elseif redis.call('ZCARD', p .. 'q:' .. record[3]) == 0 then
      redis.call('ZREM', key, slot)
      redis.call('SADD', p .. 'idle:' .. record[3], slot)
    else
      local size = size_of(p, slot, record[3])
      if has_room(quota, size) then
        quota.running, quota.gpus, quota.memory = quota.running + 1, quota.gpus + size.gpus, quota.memory + size.memory
        redis.call('ZREM', key, slot)
        redis.call('HSET', p .. 's:' .. slot, 'turn', '1')
        redis.call('PUBLISH', p .. 'wake:' .. record[4], 'work ' .. slot)
      elseif within(quota.gpus_max, size.gpus) and within(quota.memory_max, size.memory) then
        return
      else -- never, with this quota: it stands in nobody's way
        redis.call('ZADD', key, NO_TURN * TURN_STEP + tonumber(waiting[i + 1]) % TURN_STEP, slot)
      end
    end
  end
end

-- Ends a slot for good: what it had claimed goes back, its id becomes a tombstone. Safe to call twice.
local function close_slot(p, slot, reason, now)
  local key = p .. 's:' .. slot
  local record = redis.call('HMGET', key, 'status', 'shape', 'node', 'kind', 'tenant', 'gpus', 'flag')
  if not record[1] or record[1] == 'CLOSED' then return false end
  local shape = record[2]
  local returned = 0
  for _, id in ipairs(redis.call('SMEMBERS', p .. 'run:' .. slot)) do
    local task = load_task(p, id)
    if task and task.state == 'RUNNING' and task.slot == slot then
      -- The leader's own doing counts against nothing.
      give_back(p, id, task, record[7] ~= 'preempt', record[7] == 'preempt' and 'Preempted' or reason, now)
      returned = returned + 1
    end
  end
  redis.call('DEL', p .. 'run:' .. slot, p .. 'x:' .. slot)
  redis.call('HSET', key, 'status', 'CLOSED', 'closed', now, 'reason', reason, 'flag', '')
  redis.call('SREM', p .. 'slots', slot)
  redis.call('SREM', p .. 'ss:' .. shape, slot)
  redis.call('SREM', p .. 'idle:' .. shape, slot)
  if record[3] then redis.call('SREM', p .. 'ns:' .. record[3], slot) end
  redis.call('ZADD', p .. 'tombs', now, slot)
  if record[5] then -- else it has never asked for a task
    redis.call('ZREM', p .. 'qw:' .. record[5], slot)
    redis.call('HINCRBY', p .. 'tn:' .. record[5], 'running', 0 - returned)
    if record[6] then count_work(p, record[5], slot, nil, now) end
    give_turns(p, record[5])
  end
  if record[4] == 'direct' then return true end -- it has no shape here
  redis.call('HSET', p .. 'sh:' .. shape, 'wake_at', '0')
  if redis.call('ZCARD', p .. 'q:' .. shape) > 0 then work_arrived(p, shape, math.max(returned, 1)) end
  return true
end

-- Whether the caller is the leader by its token: of the controllers, or of the processes of another role.
local function leads(p, token, role)
  return redis.call('HGET', p .. 'leader' .. (role and ':' .. role or ''), 'token') == token
end

local function parent_error(parent, state)
  local ended = state == 'CANCELLED' and 'was cancelled' or ENDED_AS[state] or state
  return cjson.encode({ type = 'DependencyFailed', message = parent .. ', which the task comes after, ' .. ended })
end

-- How a task or an array has ended; nil while it has not, and where there is none. An array is as good as its worst task.
local function end_of(p, id)
  local state = redis.call('HGET', p .. 't:' .. id, 'state')
  if state then return not LIVE[state] and state or nil end
  local array = redis.call('HMGET', p .. 'a:' .. id, 'left', 'failed', 'cancelled')
  if not array[1] or tonumber(array[1]) > 0 then return nil end
  if tonumber(array[2] or '0') > 0 then return 'FAILED' end
  return tonumber(array[3] or '0') > 0 and 'CANCELLED' or 'SUCCEEDED'
end

-- Tells tasks that what they come after has ended; those that then wait for nobody may run. Returns how many were told.
-- What fails by that ends others in turn: they stand in the same list, so that a long chain takes many short steps.
local function release(p, most, now)
  local told = 0
  told_to_come = false
  while told < most do
    local parent = redis.call('SRANDMEMBER', p .. 'rel')
    if not parent then break end
    local child = redis.call('SPOP', p .. 'ch:' .. parent)
    if not child then
      redis.call('SREM', p .. 'rel', parent)
    else
      told = told + 1
      local task, state = load_task(p, child), end_of(p, parent)
      if task and task.state == 'BLOCKED' then
        if state ~= 'SUCCEEDED' and task.run ~= '1' then
          finalise(p, child, task, 'FAILED', '', parent_error(parent, state or 'is not known any more'), now)
        elseif redis.call('HINCRBY', p .. 't:' .. child, 'waits', -1) <= 0 then
          enqueue(p, child, task, now)
          work_arrived(p, task.shape, 1)
        end
      end
    end
  end
  if told == most then redis.call('PUBLISH', p .. 'ctl', 'plan') end -- the controller does the rest
  return told
end
