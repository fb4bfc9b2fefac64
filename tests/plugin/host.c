/*
 * A stand-in for Slurm's processes: exports what a plugin may call, loads one, and does what its arguments say.
 * What the plugin says and what its hooks return goes to standard output, one line each.
 *
 *	host CONTEXT COMMAND...
 *
 *	set:NAME=VALUE		a variable of the job's environment
 *	load:PATH		dlopen(), as Slurm does it
 *	other:PATH		dlopen() of another plugin, which stays in the background
 *	version			print plugin_version
 *	item:NUMBER=VALUE	the answer for a spank_item that is a number
 *	init[:ARGUMENT,...]	a hook, with plugstack arguments; likewise the others
 *	option:NAME[=VALUE]	call the callback of a registered option
 *	exec:SCRIPT		what tasks execute, instead of printing their environment
 *	task:NUMBER		fork a task: task_init_privileged, become the job's user, task_init
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <grp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/spank.h>

#define MAX 64

static void *library;
static enum spank_context context;
static long api_version;
static struct spank_option options[MAX];
static int option_count;
static uint32_t items[MAX];
static char *environment[MAX];
static gid_t groups[] = { 4711, 4712 };
static const char *script;

long slurm_api_version(void)
{
	return api_version;
}

enum spank_context spank_context(void)
{
	return context;
}

const char *spank_strerror(spank_err_t error)
{
	return error ? "stand-in error" : "Success";
}

spank_err_t spank_option_register(spank_t spank, struct spank_option *option)
{
	if (option_count == MAX)
		return ESPANK_NOSPACE;
	struct spank_option *copy = &options[option_count++];
	*copy = *option;
	copy->name = strdup(option->name);
	return 0;
}

spank_err_t spank_get_item(spank_t spank, spank_item_t item, ...)
{
	static char *argv[] = { "/spool/slurm_script", NULL };
	va_list list;
	va_start(list, item);
	switch (item) {
	case S_JOB_ENV:
		*va_arg(list, char ***) = environment;
		break;
	case S_JOB_ARGV:
		*va_arg(list, int *) = 1;
		*va_arg(list, char ***) = argv;
		break;
	case S_JOB_SUPPLEMENTARY_GIDS:
		*va_arg(list, gid_t **) = groups;
		*va_arg(list, int *) = 2;
		break;
	default:
		*va_arg(list, uint32_t *) = items[item];
	}
	va_end(list);
	return 0;
}

static char **find(const char *name)
{
	size_t length = strlen(name);
	char **entry = environment;
	while (*entry && (strncmp(*entry, name, length) || (*entry)[length] != '='))
		entry++;
	return entry;
}

spank_err_t spank_setenv(spank_t spank, const char *name, const char *value, int overwrite)
{
	char **entry = find(name);
	if (entry == &environment[MAX - 1])
		return ESPANK_NOSPACE;
	return asprintf(entry, "%s=%s", name, value) < 0 ? ESPANK_ERROR : 0;
}

spank_err_t spank_unsetenv(spank_t spank, const char *name)
{
	for (char **entry = find(name); *entry; entry++)
		entry[0] = entry[1];
	return 0;
}

#define SAY(function, kind)					\
	void function(const char *format, ...)			\
	{							\
		va_list list;					\
		va_start(list, format);				\
		printf("%s ", kind);				\
		vprintf(format, list);				\
		printf("\n");					\
		fflush(stdout);					\
		va_end(list);					\
	}
SAY(slurm_error, "error")
SAY(slurm_info, "info")
SAY(slurm_spank_log, "user")

static int hook(const char *name, char *arguments)
{
	char *argv[MAX] = { NULL };
	int argc = 0;
	for (char *word = strtok(arguments, ","); word && argc < MAX - 1; word = strtok(NULL, ","))
		argv[argc++] = word;

	char *symbol;
	if (asprintf(&symbol, "slurm_spank_%s", name) < 0)
		return -1;
	spank_f *function = (spank_f *) dlsym(library, symbol);
	if (!function) {
		printf("%s is absent\n", name);
		return -1;
	}
	int code = function((spank_t) &library, argc, argv);
	printf("%s %d\n", name, code);
	fflush(stdout);
	return code;
}

static void option(const char *name, const char *value)
{
	for (int i = 0; i < option_count; i++) {
		if (strcmp(options[i].name, name))
			continue;
		printf("%s %d\n", name, options[i].cb(options[i].val, value, context == S_CTX_REMOTE));
		fflush(stdout);
		return;
	}
	printf("%s is not registered\n", name);
}

static void task(int number)
{
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0) {
		items[S_TASK_ID] = number;
		hook("task_init_privileged", "");
		gid_t gid = items[S_JOB_GID];
		if (items[S_JOB_UID] && (setgroups(2, groups) || setgid(gid) || setuid(items[S_JOB_UID])))
			perror("cannot become the job's user");
		if (hook("task_init", "") == 0) {
			if (script)
				execle("/bin/sh", "sh", "-c", script, NULL, environment);
			for (char **entry = environment; *entry; entry++)
				printf("%s\n", *entry);
		}
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	items[S_TASK_ID] = number;
	hook("task_exit", "");
}

int main(int argc, char **argv)
{
	api_version = SLURM_VERSION_NUM(38, 0, 0);
	if (getenv("API_VERSION"))
		api_version = SLURM_VERSION_NUM(atol(getenv("API_VERSION")), 0, 0);
	context = argc > 1 ? atoi(argv[1]) : 0;

	for (int i = 2; i < argc; i++) {
		char *command = strdup(argv[i]);
		char *text = strchr(command, ':');
		if (text)
			*text++ = '\0';
		char *value = text ? strchr(text, '=') : NULL;

		if (!strcmp(command, "set")) {
			*value++ = '\0';
			spank_setenv(NULL, text, value, 1);
		} else if (!strcmp(command, "load")) {
			library = dlopen(text, RTLD_LAZY);
			if (!library) {
				printf("%s\n", dlerror());
				return 1;
			}
		} else if (!strcmp(command, "other")) {
			if (!dlopen(text, RTLD_LAZY)) {
				printf("%s\n", dlerror());
				return 1;
			}
		} else if (!strcmp(command, "version")) {
			const uint32_t *version = dlsym(library, "plugin_version");
			printf("%s %s %x\n", (char *) dlsym(library, "plugin_name"),
			       (char *) dlsym(library, "plugin_type"), *version);
		} else if (!strcmp(command, "item")) {
			items[atoi(text)] = strtoul(value + 1, NULL, 0);
		} else if (!strcmp(command, "option")) {
			if (value)
				*value++ = '\0';
			option(text, value);
		} else if (!strcmp(command, "exec")) {
			script = text;
		} else if (!strcmp(command, "task")) {
			task(atoi(text));
		} else {
			hook(command, text ? text : "");
		}
	}
	return 0;
}
