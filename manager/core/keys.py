"""Every key in the store, who owns it, and what it holds. Nobody builds a key by hand.

All keys share one hash tag, so that the whole state lies in one slot of a Redis Cluster and one function can reach it.
The library of functions gets the prefix as its only key and builds the same names (``store/lua``); a test compares the two.

======================  ======  =========================  ===========================================================
key                     type    written by                 holds
======================  ======  =========================  ===========================================================
meta                    hash    store, on first start      identity, schema version, the sequence of tasks
leader                  hash    controllers                token, holder, beat
leader:autoscaler       hash    autoscalers                the same, of those
journal                 stream  autoscaler (by functions)  its decisions, bounded
t:ID                    hash    functions                  one task
l:ID                    hash    agents (by functions)      stdout and stderr of a task's last attempt, bounded
q:SHAPE                 zset    functions                  waiting tasks, by priority class, then sequence
due                     zset    functions                  tasks in RETRY_WAIT, by the time they are due
exp                     zset    functions                  tasks that have a time limit to start or to end, by when it is up
dn:TENANT               zset    functions                  final tasks of a tenant, by the time they ended (for retention)
dt                      set     functions                  tenants that have final tasks
done                    zset    functions                  final tasks of schema 1, until an upgrade puts them in dn:TENANT
a:ID                    hash    functions                  one array: its request, and how many of its tasks have ended how
ao                      set     functions                  arrays that have tasks without a record yet
ar:TENANT               zset    functions                  arrays of a tenant, by sequence
ch:ID                   set     functions                  tasks that wait for the end of this task or array
rel                     set     functions                  tasks and arrays that have ended, whose waiting ones are to be told
nm:TENANT               hash    functions                  a tenant's name of a task → its id and the digest of its request
ik:TENANT               hash    functions                  idempotency key → when, digest of the request, ids
iks                     zset    functions                  idempotency keys by time (for retention)
tt:TENANT               zset    functions                  all tasks of a tenant, by sequence
ta:TENANT               zset    functions                  those of them that are not final
tn:TENANT               hash    functions                  what a tenant has at work, may have and has had
tenants                 set     functions                  tenants that have tasks that are not final
qw:TENANT               zset    functions                  slots that the tenant's quota keeps waiting, by turn
counts                  hash    functions                  tasks by status
shapes                  hash    functions                  SHAPE → its canonical JSON
mix                     string  functions                  the mix of requests that the scheduler has learned
active                  set     functions                  shapes that have waiting tasks or slots
sh:SHAPE                hash    functions                  learned run time and memory, counters of a shape
s:SLOT                  hash    functions                  one slot; CLOSED stays as a tombstone
slots                   set     functions                  slots that are not closed
ss:SHAPE                set     functions                  those of a shape
idle:SHAPE              set     functions                  open slots that wait for work
run:SLOT                set     functions                  tasks that the slot has claimed
x:SLOT                  set     functions                  running tasks of the slot whose cancellation was asked
n:NODE                  hash    agent (by functions)       one node: incarnation, beat, inventory, fenced, cordon
ns:NODE                 set     functions                  open slots of a node
nodes                   set     functions                  names of nodes
dv:MACHINE              hash    functions                  device → the node that has it, on one machine
refused                 hash    functions                  NODE → when and why its registration was refused
hb:NODE                 hash    Dask worker (plugin)       the worker's heartbeat with its device readings
fn:NAME                 string  agent                      a registered function: schema and defaults
functions               set     agent                      names of functions
key:ID                  hash    keys CLI, supervisor       an API key: hash of its secret, tenant, scope
keys                    set     keys CLI, supervisor       ids of API keys
services                hash    every process              NAME → where its metrics are
events                  stream  functions                  ends of tasks; only notifies
tombs                   zset    functions                  closed slots by time (for retention)
wake:NODE               channel functions                  "work SLOT", "cancel SLOT", "flag SLOT"
ctl                     channel functions                  "plan": a round of the controller is worth while
======================  ======  =========================  ===========================================================
"""

from typing import Final

import msgspec

SCHEMA_VERSION: Final = 2


SLOT_TASK_PREFIX: Final = "slot-"
"""What the Dask key of a slot's task begins with; the slot's id follows. Never to be confused with a task's id."""


class Keys(msgspec.Struct, frozen=True):
    """Names of keys under one prefix."""

    prefix: str = "{ry}:"

    def task(self, task_id: str) -> str:
        return f"{self.prefix}t:{task_id}"

    def task_log(self, task_id: str) -> str:
        return f"{self.prefix}l:{task_id}"

    def array(self, array_id: str) -> str:
        return f"{self.prefix}a:{array_id}"

    def names(self, tenant: str) -> str:
        return f"{self.prefix}nm:{tenant}"

    def queue(self, shape_id: str) -> str:
        return f"{self.prefix}q:{shape_id}"

    def slot(self, slot_id: str) -> str:
        return f"{self.prefix}s:{slot_id}"

    def node(self, node: str) -> str:
        return f"{self.prefix}n:{node}"

    def heartbeat(self, node: str) -> str:
        return f"{self.prefix}hb:{node}"

    def function(self, name: str) -> str:
        return f"{self.prefix}fn:{name}"

    def api_key(self, key_id: str) -> str:
        return f"{self.prefix}key:{key_id}"

    def tenant(self, tenant: str) -> str:
        return f"{self.prefix}tn:{tenant}"

    def wake(self, node: str) -> str:
        return f"{self.prefix}wake:{node}"

    @property
    def meta(self) -> str:
        return f"{self.prefix}meta"

    @property
    def leader(self) -> str:
        return f"{self.prefix}leader"

    @property
    def nodes(self) -> str:
        return f"{self.prefix}nodes"

    @property
    def slots(self) -> str:
        return f"{self.prefix}slots"

    @property
    def counts(self) -> str:
        return f"{self.prefix}counts"

    @property
    def functions(self) -> str:
        return f"{self.prefix}functions"

    @property
    def api_keys(self) -> str:
        return f"{self.prefix}keys"

    @property
    def services(self) -> str:
        return f"{self.prefix}services"

    @property
    def journal(self) -> str:
        return f"{self.prefix}journal"

    @property
    def due(self) -> str:
        return f"{self.prefix}due"

    @property
    def events(self) -> str:
        return f"{self.prefix}events"

    @property
    def ctl(self) -> str:
        return f"{self.prefix}ctl"
