"""An example of each body and each answer, for the OpenAPI document. A test holds them against the models."""

from __future__ import annotations

import json
from typing import Any

_USER = "user-42"
_RUN_ID = "0b6a3f0c-5d0e-4c1b-9a53-6f0f4f5f8a11"
_AT = "2026-11-21T09:00:00Z"
_WINDOW = {"windowStart": "2026-11-21T08:30:00Z", "windowEnd": "2026-12-21T08:30:00Z"}
_LAST = {"at": "2026-10-22T09:00:04Z", "creditsAdded": 640}
_LAST_WINDOW = {"windowStart": "2026-10-22T08:30:00Z", "windowEnd": "2026-11-21T08:30:00Z"}

_RUN: dict[str, Any] = {
    "runId": _RUN_ID,
    "createdAt": _AT,
    "kind": "refresh",
    "work": "refresh",
    "source": "api",
    "status": "running",
    "dryRun": False,
    "usersSelected": 1200,
    "usersDone": 300,
    "usersRefreshed": 298,
    "usersHeld": 2,
    "usersSkipped": 0,
    "usersFailed": 0,
    "creditsGranted": 190400,
    "seconds": 0.212,
    "requestedBy": "api:key:crs_ab12cd34",
    "reason": "scan was down, ticket 1234",
    "maxUsersPerSecond": None,
}
_NEW = {"usersDone": 0, "usersRefreshed": 0, "usersHeld": 0, "creditsGranted": 0, "seconds": 0.004}
_OPENED = {**_RUN, **_NEW, "existing": False}
_ENDED = {"status": "succeeded", "usersDone": 1200, "usersRefreshed": 1198, "creditsGranted": 765000, "seconds": 0.61}

_DECISION: dict[str, Any] = {
    "id": 90071,
    "createdAt": "2026-11-21T09:00:02Z",
    "status": "refreshed",
    **_WINDOW,
    "planCode": "free",
    "oldBalance": 360,
    "creditsAdded": 640,
    "newBalance": 1000,
}
_ENTRY = {
    **_DECISION,
    "source": "run",
    "runId": _RUN_ID,
    "firstMissedAt": None,
    "windowsPassed": 1,
    "grantMode": "fill",
    "target": 1000,
    "shortfall": 0,
    "reason": "scheduled",
    "error": None,
    "reversedByRunId": None,
}
_TOTALS: dict[str, Any] = {
    "runs": 720,
    "succeeded": 719,
    "partial": 1,
    "failed": 0,
    "cancelled": 0,
    "empty": 12,
    "usersRefreshed": 84210,
    "usersHeld": 17,
    "usersSkipped": 4,
    "usersFailed": 1,
    "credits": 61204400,
    "medianSeconds": 0.31,
    "p95Seconds": 1.8,
    "maxSeconds": 4.02,
    "usersPerSecond": 21740.2,
}
_OUTLOOK: dict[str, Any] = {
    "users": 1200,
    "refreshes": 1200,
    "creditsLeast": 0,
    "creditsMost": 1200000,
    "plans": [{"planCode": "free", "users": 1200, "refreshes": 1200, "creditsLeast": 0, "creditsMost": 1200000}],
    "days": [
        {"day": "2026-11-22", "planCode": "free", "refreshes": 1200, "creditsLeast": 0, "creditsMost": 1200000},
    ],
    "notRefreshed": {
        "later": 80, "held": 2, "inactive": 5, "noPlan": 0, "external": 0, "unscheduled": 1, "overflow": 0,
    },
}  # fmt: skip

EVENTS_EXAMPLE = f"""event: progress
data: {json.dumps(_RUN)}
id: running-300-298-0
retry: 1000

event: end
data: {json.dumps({**_RUN, **_ENDED})}
id: succeeded-1200-1198-0
retry: 1000

"""

STRIPE_EVENT = {
    "id": "evt_1SVx2bK9mQ",
    "object": "event",
    "api_version": "2026-10-28.endive",
    "created": 1795251600,
    "type": "customer.subscription.deleted",
    "livemode": True,
    "data": {
        "object": {"id": "sub_1SVx2aK9mQ", "object": "subscription", "customer": "cus_T0m4Ex", "status": "canceled"}
    },
}
_ENDPOINT: dict[str, Any] = {
    "id": "6f1b6c1e-08b5-4c0f-8a51-0d4f6f2d9c55",
    "url": "https://example.com/hooks",
    "format": "standard",
    "events": ["run.finished"],
    "noGrantsDays": 3,
    "description": "the app's own",
    "active": True,
    "inactiveReason": None,
    "createdBy": "api:admin-token",
    "createdAt": _AT,
    "failures": 0,
    "resumeAt": None,
}
_DELIVERY: dict[str, Any] = {
    "id": 812,
    "messageId": "0d9c2f0a-5a7b-4a57-b8ce-2c1c54f5a2f0",
    "endpointId": _ENDPOINT["id"],
    "type": "run.finished",
    "status": "delivered",
    "attempts": 1,
    "nextAttemptAt": None,
    "lastStatus": 204,
    "lastError": None,
    "createdAt": _AT,
    "finishedAt": "2026-11-21T09:00:01Z",
}

EXAMPLES: dict[str, dict[str, Any]] = {
    # --- bodies
    "RefreshBody": {"reason": "ticket 1234", "force": True, "keepWindow": True, "amount": 500},
    "SettingsBody": {"creditRefreshHold": True, "holdReason": "chargeback", "holdUntil": "2999-12-01T00:00:00Z"},
    "BulkBody": {"planCode": "pro", "force": True, "dryRun": True, "reason": "outage of 2026-11-20"},
    "ActionBody": {"reason": "checked by ada", "maxUsersPerSecond": 500},
    "RollbackBody": {"reason": "wrong amount", "reopen": True},
    "CancelBody": {"reason": "wrong plan"},
    "ManualBody": {"bypass": False, "reason": "after the outage"},
    # --- one user
    "Refreshed": {
        "userId": _USER,
        "runId": _RUN_ID,
        "existing": False,
        "status": "succeeded",
        "dryRun": False,
        "outcome": "refreshed",
        "creditsAdded": 640,
        "balanceBefore": 360,
        "balanceAfter": 1000,
        "amount": 1000,
        **_WINDOW,
        "nextRefreshAt": _WINDOW["windowEnd"],
        "reversed": False,
        "error": None,
    },
    "HistoryPage": {"entries": [_ENTRY], "next": "90071"},
    "Verdict": {
        "userId": _USER,
        "at": _AT,
        "verdict": "held",
        "paused": False,
        "allRunsDry": False,
        "active": True,
        "planCode": "free",
        "planActive": True,
        "cadence": "rolling",
        "grantMode": "fill",
        "creditBalance": "9007199254740993",
        "nextRefreshAt": _WINDOW["windowStart"],
        "next": {
            "verdict": "due",
            **_WINDOW,
            "firstMissedAt": None,
            "windowsPassed": 1,
            "amount": 1000,
            "creditsAdded": 0,
            "alreadyGranted": False,
        },
        "hold": {
            "reason": "chargeback",
            "until": None,
            "ended": False,
            "since": "2026-11-20T14:00:00Z",
            "by": "api:key:crs_ab12cd34",
            "changedAt": None,
            "changedBy": None,
        },
        "unfinishedRun": None,
        "lastRefresh": {**_LAST, "source": "run", "runId": _RUN_ID, **_LAST_WINDOW},
    },
    "Settings": {
        "userId": _USER,
        "creditRefreshHold": True,
        "holdReason": "chargeback",
        "holdUntil": None,
        "creditRefreshDay": None,
        "customCreditAmount": 5000,
        "timezone": "Europe/Berlin",
        "nextRefreshAt": _WINDOW["windowEnd"],
    },
    "NextRefresh": {
        "creditBalance": 360,
        "planCode": "free",
        "onHold": False,
        "nextRefreshAt": _WINDOW["windowEnd"],
        "amount": 1000,
        "creditsAdded": 640,
        "lastRefresh": {**_LAST, **_LAST_WINDOW},
    },
    "OwnHistoryPage": {"entries": [_DECISION], "next": None},
    # --- runs
    "Opened": _OPENED,
    "BulkOpened": {**_OPENED, "unknownUsers": 1, "unknownSample": ["user-4Z"]},
    "RunPage": {"runs": [_RUN], "next": _RUN_ID},
    "RunDetail": {
        **_RUN,
        "asOf": None,
        "slot": None,
        "parentRunId": None,
        "subjectRunId": None,
        "selection": {"due": True, "plan": "free"},
        "force": False,
        "keepWindow": False,
        "amount": None,
        "atomic": False,
        "idempotencyKey": "outage-1120",
        "startedAt": _AT,
        "finishedAt": None,
        "cancelledBy": None,
        "cancelReason": None,
        "error": None,
        "children": [],
        "batches": [
            {"status": "done", "batches": 3, "users": 300, "usersDeferred": 0, "attempts": 0, "credits": 190400},
            {"status": "pending", "batches": 9, "users": 900, "usersDeferred": 0, "attempts": 0, "credits": 0},
        ],
        "oldestPending": {
            "batchId": 5104,
            "seq": 3,
            "users": 100,
            "attempts": 0,
            "publishedAt": _AT,
            "nextAttemptAt": None,
            "error": None,
        },
        "failedBatches": [],
        "failedUsers": [],
        "apply": None,
        "rollback": None,
    },
    "Cancelled": {
        "runId": _RUN_ID,
        "kind": "refresh",
        "work": "refresh",
        "dryRun": False,
        "status": "cancelled",
        "batchesCancelled": 9,
        "usersCancelled": 900,
        "usersSelected": 1200,
        "usersRefreshed": 298,
        "usersHeld": 2,
        "usersSkipped": 0,
        "usersFailed": 0,
        "creditsGranted": 190400,
    },
    "Reset": {
        "success": True,
        "resetCount": 1200,
        "date": "2026-11-21",
        "run": {**_OPENED, "source": "cron", "requestedBy": "api:cron"},
    },
    "ResetStatus": {
        "at": _AT,
        "paused": False,
        "lastRun": {**_RUN, **_ENDED},
        "lastSuccess": {**_RUN, **_ENDED},
        "nextRunAt": "2026-11-21T10:00:00Z",
        "timezone": "UTC",
        "timetable": "every 1:00:00",
        "workersAlive": True,
        "workers": ["worker@6c1f4b0e2a77"],
        "beatAlive": True,
        "beat": "the last one is that of 2026-11-21 09:00 UTC",
        "history": [{**_RUN, **_ENDED}],
    },
    # --- webhooks
    "NewEndpoint": {"url": "https://example.com/hooks", "events": ["run.finished"], "noGrantsDays": 3},
    "EndpointChanges": {"active": False},
    "Endpoint": _ENDPOINT,
    "EndpointList": {"endpoints": [_ENDPOINT]},
    "AddedEndpoint": {**_ENDPOINT, "secret": "whsec_c2hvd24gdGhpcyBvbmNl"},
    "DeliveryPage": {"deliveries": [_DELIVERY], "next": None},
    "DeliveryDetail": {**_DELIVERY, "data": {"runId": _RUN_ID, "status": "succeeded", "usersRefreshed": 1198}},
    "StripeReceipt": {
        "eventId": STRIPE_EVENT["id"],
        "type": STRIPE_EVENT["type"],
        "outcome": "unknown_customer",
        "userId": None,
        "runId": None,
        "periodStart": None,
        "periodEnd": None,
        "text": "nobody is known for the customer cus_T0m4Ex: it is kept for `credits webhooks replay`",
    },
    # --- reports
    "Stats": {
        "at": _AT,
        "since": "2026-10-22T09:00:00Z",
        "granting": {**_TOTALS, "userSuccessRate": 0.99999, "runSuccessRate": 0.99861},
        "byKind": [{**_TOTALS, "kind": "refresh", "dryRun": False}],
        "takenBack": {"users": 0, "credits": 0},
        "failures": {
            "total": 1,
            "causes": 1,
            "top": [
                {
                    "error": "a balance over 1000000 needs a signature",
                    "failures": 1,
                    "runs": 1,
                    "exampleUserId": _USER,
                    "exampleRunId": _RUN_ID,
                }
            ],
        },
        "grants": {
            "windowsSince": "2026-09-21T00:00:00Z",
            "bySource": [{"source": "run", "grants": 84210, "credits": 61204400}],
        },
        "users": {
            "total": 1288,
            "due": 0,
            "notDue": 1280,
            "held": 2,
            "inactive": 5,
            "noPlan": 0,
            "external": 0,
            "unscheduled": 1,
            "overflow": 0,
            "overdue": 0,
            "overdueBefore": "2026-11-21T07:00:00Z",
            "dueSince": None,
        },
    },
    "Forecast": {
        "at": _AT,
        "firstDay": "2026-11-21",
        "lastDay": "2026-12-20",
        "paused": False,
        "allRunsDry": False,
        "asItIs": _OUTLOOK,
        "changes": None,
        "whatIf": None,
        "difference": None,
    },
    # --- the service
    "Alive": {"status": "alive"},
    "Readiness": {
        "status": "ready",
        "checks": {
            "database": {"status": "ok", "detail": "answers"},
            "migrations": {"status": "ok", "detail": "the tables are at this release's migration"},
            "broker": {"status": "ok", "detail": "answers"},
        },
    },
    "Meaning": {
        "type": "/problems/paused",
        "title": "Paused",
        "status": 409,
        "meaning": "Nothing is granted on any path at present: paused, or disabled by its settings.",
    },
}
