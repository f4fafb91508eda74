/* SPDX-License-Identifier: Apache-2.0
 *
 * SQLite made to call the program's own code: a collation, aggregates, a virtual table.
 * Usage: driver collation|aggregate|vtable. Speaks the drivers' protocol: "ready", then
 * "NANOSECONDS RESULT" (CPU time) for each line of standard input.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sqlite3.h"

enum { N_ROWS = 20000, N_VIRTUAL = 200000 };

static void die(const char *what, sqlite3 *db) {
  fprintf(stderr, "%s: %s\n", what, db ? sqlite3_errmsg(db) : "failed");
  exit(1);
}

/* Collation: bytes without regard to case, longer strings first among equals. */
static int fold_compare(void *unused, int n_a, const void *a, int n_b, const void *b) {
  const unsigned char *left = a, *right = b;
  (void)unused;
  for (int i = 0; i < n_a && i < n_b; i++) {
    int difference = (left[i] | 0x20) - (right[i] | 0x20);
    if (difference) return difference;
  }
  return n_b - n_a;
}

/* Aggregates: a range and a checksum, each stepped once per row. */
typedef struct {
  int64_t low, high;
  int any;
} Range;

static void range_step(sqlite3_context *context, int n, sqlite3_value **values) {
  Range *range = sqlite3_aggregate_context(context, sizeof *range);
  int64_t value = sqlite3_value_int64(values[0]);
  (void)n;
  if (!range) return;
  if (!range->any || value < range->low) range->low = value;
  if (!range->any || value > range->high) range->high = value;
  range->any = 1;
}

static void range_final(sqlite3_context *context) {
  Range *range = sqlite3_aggregate_context(context, 0);
  sqlite3_result_int64(context, range ? range->high - range->low : 0);
}

static void checksum_step(sqlite3_context *context, int n, sqlite3_value **values) {
  uint64_t *sum = sqlite3_aggregate_context(context, sizeof *sum);
  (void)n;
  if (sum) *sum = (*sum * 31 + (uint64_t)sqlite3_value_int64(values[0])) & 0x7fffffff;
}

static void checksum_final(sqlite3_context *context) {
  uint64_t *sum = sqlite3_aggregate_context(context, 0);
  sqlite3_result_int64(context, sum ? (int64_t)*sum : 0);
}

/* Virtual table: rows made up as they are read; every step of a scan is a callback. */
typedef struct {
  sqlite3_vtab_cursor base;
  int64_t row;
} Cursor;

static int vt_connect(sqlite3 *db, void *aux, int n, const char *const *arguments,
                      sqlite3_vtab **made, char **error) {
  (void)aux, (void)n, (void)arguments, (void)error;
  int status = sqlite3_declare_vtab(db, "CREATE TABLE made(id INTEGER, key INTEGER, size INTEGER)");
  if (status != SQLITE_OK) return status;
  *made = sqlite3_malloc(sizeof **made);
  if (!*made) return SQLITE_NOMEM;
  memset(*made, 0, sizeof **made);
  return SQLITE_OK;
}

static int vt_disconnect(sqlite3_vtab *table) {
  sqlite3_free(table);
  return SQLITE_OK;
}

static int vt_best_index(sqlite3_vtab *table, sqlite3_index_info *info) {
  (void)table;
  info->estimatedCost = N_VIRTUAL;
  return SQLITE_OK;
}

static int vt_open(sqlite3_vtab *table, sqlite3_vtab_cursor **made) {
  Cursor *cursor = sqlite3_malloc(sizeof *cursor);
  (void)table;
  if (!cursor) return SQLITE_NOMEM;
  memset(cursor, 0, sizeof *cursor);
  *made = &cursor->base;
  return SQLITE_OK;
}

static int vt_close(sqlite3_vtab_cursor *cursor) {
  sqlite3_free(cursor);
  return SQLITE_OK;
}

static int vt_filter(sqlite3_vtab_cursor *cursor, int index, const char *name, int n,
                     sqlite3_value **values) {
  (void)index, (void)name, (void)n, (void)values;
  ((Cursor *)cursor)->row = 0;
  return SQLITE_OK;
}

static int vt_next(sqlite3_vtab_cursor *cursor) {
  ((Cursor *)cursor)->row++;
  return SQLITE_OK;
}

static int vt_eof(sqlite3_vtab_cursor *cursor) { return ((Cursor *)cursor)->row >= N_VIRTUAL; }

static int vt_column(sqlite3_vtab_cursor *cursor, sqlite3_context *context, int column) {
  int64_t row = ((Cursor *)cursor)->row;
  int64_t value = column == 0 ? row : column == 1 ? row * 2654435761 % 1000 : row % 17;
  sqlite3_result_int64(context, value);
  return SQLITE_OK;
}

static int vt_rowid(sqlite3_vtab_cursor *cursor, sqlite3_int64 *id) {
  *id = ((Cursor *)cursor)->row;
  return SQLITE_OK;
}

static const sqlite3_module made_module = {
    .xConnect = vt_connect, .xBestIndex = vt_best_index, .xDisconnect = vt_disconnect,
    .xOpen = vt_open,       .xClose = vt_close,          .xFilter = vt_filter,
    .xNext = vt_next,       .xEof = vt_eof,              .xColumn = vt_column,
    .xRowid = vt_rowid,
};

static const char *query_of(const char *workload) {
  if (!strcmp(workload, "collation"))
    return "SELECT checksum(id) FROM (SELECT id FROM item ORDER BY name COLLATE fold, id)";
  if (!strcmp(workload, "aggregate"))
    return "SELECT checksum(a + b) FROM (SELECT spread(size) AS a, checksum(id) AS b"
           " FROM item GROUP BY kind)";
  if (!strcmp(workload, "vtable"))
    return "SELECT count(*) + sum(size) FROM made WHERE key < 700 AND id > 100";
  return NULL;
}

static void fill(sqlite3 *db) {
  sqlite3_stmt *insert;
  unsigned long seed = 7;
  if (sqlite3_exec(db, "CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT, kind INTEGER,"
                       " size INTEGER); BEGIN", 0, 0, 0))
    die("create", db);
  if (sqlite3_prepare_v2(db, "INSERT INTO item VALUES(?,?,?,?)", -1, &insert, 0))
    die("prepare", db);
  for (int i = 0; i < N_ROWS; i++) {
    char name[32];
    seed = (seed * 1103515245 + 12345) & 0x7fffffff;
    snprintf(name, sizeof name, "%s-%08lx", seed & 64 ? "Item" : "item", seed);
    sqlite3_bind_int(insert, 1, i);
    sqlite3_bind_text(insert, 2, name, -1, SQLITE_TRANSIENT);
    sqlite3_bind_int(insert, 3, i / 50);
    sqlite3_bind_int(insert, 4, (int)(seed >> 8) % 1000);
    if (sqlite3_step(insert) != SQLITE_DONE) die("insert", db);
    sqlite3_reset(insert);
  }
  sqlite3_finalize(insert);
  if (sqlite3_exec(db, "CREATE INDEX item_kind ON item(kind); COMMIT", 0, 0, 0))
    die("index", db);
}

static int64_t cpu_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int main(int argc, char **argv) {
  const char *query = argc == 2 ? query_of(argv[1]) : NULL;
  sqlite3 *db;
  sqlite3_stmt *statement;
  char line[256];
  if (!query) {
    fprintf(stderr, "usage: %s collation|aggregate|vtable\n", argv[0]);
    return 2;
  }
  /* As many queries in an iteration as take a twentieth of a second or so. */
  int repeats = argv[1][0] == 'a' ? 24 : argv[1][0] == 'c' ? 5 : 6;
  if (sqlite3_open(":memory:", &db)) die("open", db);
  if (sqlite3_create_collation(db, "fold", SQLITE_UTF8, 0, fold_compare) ||
      sqlite3_create_function(db, "spread", 1, SQLITE_UTF8, 0, 0, range_step, range_final) ||
      sqlite3_create_function(db, "checksum", 1, SQLITE_UTF8, 0, 0, checksum_step,
                              checksum_final) ||
      sqlite3_create_module(db, "made", &made_module, 0))
    die("register", db);
  fill(db);
  if (sqlite3_prepare_v2(db, query, -1, &statement, 0)) die("prepare", db);
  puts("ready");
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {
    int64_t result = 0, begin = cpu_ns();
    for (int i = 0; i < repeats; i++) {
      if (sqlite3_step(statement) != SQLITE_ROW) die("step", db);
      result = sqlite3_column_int64(statement, 0);
      sqlite3_reset(statement);
    }
    printf("%lld %lld\n", (long long)(cpu_ns() - begin), (long long)result);
    fflush(stdout);
  }
  sqlite3_finalize(statement);
  sqlite3_close(db);
  return 0;
}
